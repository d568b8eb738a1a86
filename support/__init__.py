"""What a run needs beside the method: settings (config), checkpoints, what is shown (console), several processes."""
