"""The surroundings a job runs in: a command line, two folders, or a WebUI."""
