"""This package has a decoding loop that is faster than HuggingFace's for responses of different lengths, and the
checks that a model must pass when it is loaded."""
