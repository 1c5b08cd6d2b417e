"""What an instance is to be: the file that people edit, its language, and what of it can be."""
