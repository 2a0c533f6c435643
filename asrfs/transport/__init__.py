"""The only room with sockets: TLS, framed streams, backoff between tries."""
