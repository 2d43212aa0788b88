"""Commands: the flags of each and what it prints; `launch/` and `huatuo` run them."""
