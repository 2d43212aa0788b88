"""From dialogue files to packed rows of tokens."""
