"""Connect over TLS with a client certificate, which may also be the login (SASL EXTERNAL).

It needs no sibling, but a broker with a TLS listener::

    export AMQP_URL=amqps://localhost/      # port 5671
    export CA_FILE=ca.pem                   # who signed the broker's certificate
    export CERT_FILE=client.pem KEY_FILE=client.key
    export AUTH=external                    # the certificate is the login; leave it out to log in with a password
    python examples/tls_client_certificate.py

EXTERNAL needs the plugin rabbitmq_auth_mechanism_ssl: https://www.rabbitmq.com/docs/ssl
"""

import asyncio
import os

import leveret
from leveret.types import SSLOptions

URL = os.environ.get("AMQP_URL", "amqps://localhost/")


async def main() -> None:
    # Each of these could stand in the URL as well: amqps://localhost/?cafile=ca.pem&certfile=client.pem&…
    files: SSLOptions = {
        "cafile": os.environ["CA_FILE"],
        "certfile": os.environ["CERT_FILE"],
        "keyfile": os.environ["KEY_FILE"],
    }
    async with await leveret.connect(URL, ssl_options=files, auth=os.environ.get("AUTH", "plain")) as connection:
        product, version = (connection.server_properties[key] for key in ("product", "version"))
        print(f"Connected to {product} {version} over TLS")

        channel = await connection.channel(on_return_raises=True)
        queue = await channel.declare_queue(exclusive=True)
        await channel.default_exchange.publish(leveret.Message(b"for your eyes only"), queue.name)
        async with (await queue.get()).process() as message:
            print(f"Received: {message.body.decode()}")


if __name__ == "__main__":
    asyncio.run(main())
