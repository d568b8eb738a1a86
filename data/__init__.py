"""The embedded task and its base model, the loader of data files, public data sets."""
