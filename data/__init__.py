"""This package has the embedded task and its base model, the loader of data files, and public data sets."""
