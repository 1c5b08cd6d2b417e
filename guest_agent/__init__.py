"""The agent in the VM: what listens there, connections and processes on behalf of the host."""
