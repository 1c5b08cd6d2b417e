"""A Linux machine behind SSH as an instance: no VM, the same agent over there, the same parts here."""
