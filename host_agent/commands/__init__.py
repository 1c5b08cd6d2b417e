"""The commands, a module for each family. Thin: each reads its words, asks the host agent and prints the answer."""
