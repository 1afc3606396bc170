"""What real applications talk to, outside: HTTP that says who asked, and UDP that speaks when told.

peers.py http ADDRESS PORT      answers each request with "remote CLIENT"; /big is 4 MiB, /repository.git has a branch
peers.py echo ADDRESS PORT      UDP: prints each datagram as "TEXT from CLIENT"; on a line of stdin,
                                sends that line to the last client
peers.py app ADDRESS PORT       the application: sends "hello", then answers each datagram with
                                three of its own; prints what it hears
peers.py quic-server ADDRESS PORT CERT KEY
peers.py quic-client ADDRESS PORT   QUIC (aioquic, from a socket of both families): one stream, prints the answer
"""
import asyncio
import http.server
import select
import socket
import socketserver
import sys


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def serve_http(address, port):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            client = self.client_address[0].replace("::ffff:", "")
            body = f"remote {client}\n".encode()
            if self.path == "/big":
                body = b"x" * (4 << 20)
            elif self.path.startswith("/repository.git/info/refs"):
                # a repository as a plain web server has it, gitrepository-layout(5)
                body = b"%040x\trefs/heads/main\n" % 7
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        address_family = family(address)
        daemon_threads = True

        def server_bind(self):
            # not HTTPServer's, which asks DNS for a name
            socketserver.TCPServer.server_bind(self)
            self.server_name, self.server_port = address, port

    server = Server((address, port), Handler)
    print("ready", flush=True)
    server.serve_forever()


def echo(address, port):
    here = socket.socket(family(address), socket.SOCK_DGRAM)
    here.bind((address, port))
    print("ready", flush=True)
    client = None
    while True:
        for ready in select.select([here, sys.stdin], [], [])[0]:
            if ready is here:
                data, client = here.recvfrom(2048)
                print(data.decode(errors="replace"), "from", client[0], flush=True)
            else:
                line = sys.stdin.readline()
                if not line:
                    return
                here.sendto(line.strip().encode(), client)


def app(address, port):
    here = socket.socket(family(address), socket.SOCK_DGRAM)
    here.sendto(b"hello", (address, port))
    print("sent", flush=True)
    while True:
        data, remote = here.recvfrom(2048)
        print("heard", data.decode(errors="replace"), "from", remote[0], flush=True)
        for number in range(3):
            try:
                here.sendto(b"answer %d" % number, (address, port))
            except OSError as error:
                print("refused", error, flush=True)


def quic(role, address, port, files):
    from aioquic.asyncio import QuicConnectionProtocol, connect, serve
    from aioquic.quic.configuration import QuicConfiguration
    from aioquic.quic.events import StreamDataReceived

    class Peer(QuicConnectionProtocol):
        def quic_event_received(self, event):
            if isinstance(event, StreamDataReceived):
                self._quic.send_stream_data(event.stream_id, b"remote " + event.data, True)
                self.transmit()

    async def server():
        configuration = QuicConfiguration(is_client=False, alpn_protocols=["hq"])
        configuration.load_cert_chain(*files)
        await serve(address, port, configuration=configuration, create_protocol=Peer)
        print("ready", flush=True)
        await asyncio.Event().wait()

    async def client():
        configuration = QuicConfiguration(is_client=True, alpn_protocols=["hq"])
        configuration.verify_mode = 0
        async with connect(address, port, configuration=configuration) as peer:
            reader, writer = await peer.create_stream()
            writer.write(b"hello")
            writer.write_eof()
            print((await asyncio.wait_for(reader.read(), 10)).decode(), flush=True)

    asyncio.run(server() if role == "server" else client())


def main():
    role, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if role == "http":
        serve_http(address, port)
    elif role == "echo":
        echo(address, port)
    elif role == "app":
        app(address, port)
    else:
        quic(role.removeprefix("quic-"), address, port, sys.argv[4:])


main()
