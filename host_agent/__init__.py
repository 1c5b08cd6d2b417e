"""The host's side: the command line, and the agent that makes a VM feel like localhost."""
