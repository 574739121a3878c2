"""The ops: linear.py has the public one, quantized.py the same for codes, packed.py the calls of
layers packed for inference; export.py has them as plain products."""
