def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="small matrices: under a minute in all")
