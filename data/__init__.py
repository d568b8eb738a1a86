"""This package has the embedded task and its base model, the loader of data files, and scripts that make or fetch
other data sets."""
