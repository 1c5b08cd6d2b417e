"""``agentctl doctor``: what of this machine is in the way of an instance, or makes it slower than it could be.

The laws: nothing is changed, installed or asked for (no password, no network); what is wrong is said with what to type
against it; and no disk, program or host agent that hangs holds this up for long.
"""
