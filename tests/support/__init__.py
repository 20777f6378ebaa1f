"""Random models, files and folders that the tests and benchmarks share."""
