"""The guest image and the machine it runs on: recipe, build, QEMU's command line, the agent's drive."""
