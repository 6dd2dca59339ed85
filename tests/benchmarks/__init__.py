"""The hot paths, timed; every time is also told as a ratio measured in the same run."""
