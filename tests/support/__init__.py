"""What the tests stand on: brokers to run, a proxy to hurt them with, and a peer that says what it is told."""
