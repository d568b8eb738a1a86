"""This package has a faster decoding loop for responses of different lengths, and the checks that a model must pass
when it is loaded."""
