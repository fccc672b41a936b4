"""One TCP connection and the channels on it: opened once, they die once."""
