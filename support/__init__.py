"""This package has what a run needs beside the method: settings, checkpoints, output, and several processes."""
