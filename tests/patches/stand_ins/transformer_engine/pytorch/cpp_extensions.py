"""The compiled part; nothing of it is called."""
