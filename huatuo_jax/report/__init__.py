"""The report of a run: one page that can be read anywhere, made of the files in its folder."""
