"""One module for each client, with its `Client`, an adapter; and `librabbitmq.c`, a worker of its own."""
