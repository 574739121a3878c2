"""An ONNX file of `hylora export` as a TensorRT engine.

    hylora export MODEL --to onnx --out FOLDER
    python examples/tensorrt_build.py FOLDER/model.onnx --print     the trtexec line, built nowhere
    python examples/tensorrt_build.py FOLDER/model.onnx             by TensorRT's Python API

No GPU has run this: shapes, names and the printed line are tested, building is not. TensorRT has no
MatMulNBits, so a model with codes is first made dense: `hylora export MODEL --to dense`, then the
folder that this writes `--to onnx`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnx

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def profile(path: Path, batch: int, length: int) -> Shapes:
    """input -> its (least, usual, largest) shape: a decoded token with one before it, a decoded
    token in the middle, and a whole prompt with as many tokens before it."""
    graph = onnx.load(path, load_external_data=False).graph
    foreign = sorted({node.op_type for node in graph.node if node.domain == "com.microsoft"})
    if foreign:
        raise ValueError(f"{path}: {', '.join(foreign)} of ONNX Runtime are not in TensorRT")
    cases = ((1, 1, 1), (batch, 1, length // 2), (batch, length, length))
    found = {}
    for value in graph.input:
        fixed = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        found[value.name] = tuple(shape(value.name, fixed, *case) for case in cases)
    return found


def shape(name: str, fixed: list[int], rows: int, tokens: int, before: int) -> tuple[int, ...]:
    """The shape of one input; fixed has 0 where a dim is free."""
    if name == "attention_mask":
        return rows, before + tokens
    if len(fixed) == 4:  # keys or values so far [rows, heads, tokens, head dim]
        return rows, fixed[1], before, fixed[3]
    return rows, tokens


def trtexec(path: Path, shapes: Shapes) -> str:
    """The command line that builds the same engine."""
    words = ["trtexec", f"--onnx={path}", f"--saveEngine={path.with_suffix('.engine')}"]
    for place, flag in enumerate(("minShapes", "optShapes", "maxShapes")):
        sizes = (f"{n}:{'x'.join(map(str, three[place]))}" for n, three in shapes.items())
        words.append(f"--{flag}={','.join(sizes)}")
    return " ".join(words)


def build(path: Path, shapes: Shapes) -> Path:
    """Build and write the engine; returns its path."""
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise RuntimeError(f"{path}: {'; '.join(errors)}")
    config, ranges = builder.create_builder_config(), builder.create_optimization_profile()
    for name, three in shapes.items():
        ranges.set_shape(name, *three)
    config.add_optimization_profile(ranges)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError(f"{path}: TensorRT built nothing, see its log")
    out = path.with_suffix(".engine")
    out.write_bytes(engine)
    return out


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("onnx", type=Path, help="model.onnx of an export")
    parser.add_argument("--batch", type=int, default=8, help="most sequences (8)")
    parser.add_argument("--length", type=int, default=2048, help="most tokens of a prompt (2048)")
    parser.add_argument("--print", action="store_true", help="only print the trtexec line")
    options = parser.parse_args(words)
    shapes = profile(options.onnx, options.batch, options.length)
    print(trtexec(options.onnx, shapes) if options.print else build(options.onnx, shapes))


if __name__ == "__main__":
    main()
