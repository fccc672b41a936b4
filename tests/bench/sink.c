/* The null sink: an AMQP 0-9-1 "broker" without routing or storage, to show what a client alone can do.
 *
 * What is published is swallowed, and confirmed by one basic.ack for all that one read brought. A consumer of a queue
 * named leveret.bench.<n>.<size> is sent n prepared deliveries with bodies of that size, as far as its prefetch
 * allows. Whatever else a client asks for is granted.
 *
 * It prints its port, on loopback, and ends with its standard input. A thread for each connection.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CHANNELS = 2048, FRAME_MAX = 131072, READ = 1 << 20, FRAME_END = 0xce };
enum { METHOD = 1, HEADER = 2, BODY = 3 };
#define ID(class, method) ((class) << 16 | (method))

typedef struct {
    int confirms;            /* the channel is in confirm mode */
    uint64_t body_left;      /* of the message that is being read */
    uint64_t published;      /* messages read, and ... */
    uint64_t confirmed;      /* ... how many of them were confirmed */
    uint64_t n, sent, acked; /* deliveries: all, sent, acknowledged by the client */
    uint64_t prefetch;
    int no_ack;
    char *deliveries;        /* n of `length` bytes each */
    size_t length;
    int touched;             /* there may be something to confirm or to deliver after this read */
} channel;

typedef struct {
    int fd;
    channel channels[CHANNELS];
    char *out;
    size_t length, capacity;
} connection;

/* ---------------------------------------------------------------------------------------------- encoding */

static uint64_t get(const uint8_t *from, int octets) {
    uint64_t value = 0;
    while (octets--) value = value << 8 | *from++;
    return value;
}

static char *put(char *to, uint64_t value, int octets) {
    for (int i = octets - 1; i >= 0; i--, value >>= 8) to[i] = (char)value;
    return to + octets;
}

static char *put_bytes(char *to, const void *from, size_t length) {
    memcpy(to, from, length);
    return to + length;
}

static char *put_short(char *to, const char *text) {
    to = put(to, strlen(text), 1);
    return put_bytes(to, text, strlen(text));
}

static char *put_long(char *to, const void *from, size_t length) {
    return put_bytes(put(to, length, 4), from, length);
}

static char *put_head(char *to, int type, int channel, size_t length) {
    return put(put(put(to, type, 1), channel, 2), length, 4);
}

/* ------------------------------------------------------------------------------------------------ output */

static int write_all(int fd, const char *from, size_t length) {
    while (length) {
        ssize_t written = write(fd, from, length);
        if (written <= 0) return -1;
        from += written;
        length -= written;
    }
    return 0;
}

static int flush(connection *c) {
    size_t length = c->length;
    c->length = 0;
    return write_all(c->fd, c->out, length);
}

static void send_method(connection *c, int number, uint32_t id, const char *arguments, size_t length) {
    if (c->length + length + 12 > c->capacity) {
        c->capacity = (c->length + length + 12) * 2;
        c->out = realloc(c->out, c->capacity);
    }
    char *to = put_head(c->out + c->length, METHOD, number, length + 4);
    to = put_bytes(put(to, id, 4), arguments, length);
    to = put(to, FRAME_END, 1);
    c->length = to - c->out;
}

static void send_start(connection *c) {
    char capabilities[100], properties[200], arguments[300];
    char *to = capabilities;
    const char *names[] = {"publisher_confirms", "basic.nack", "consumer_cancel_notify"};
    for (int i = 0; i < 3; i++) to = put_bytes(put_short(to, names[i]), "t\1", 2);
    size_t length = to - capabilities;
    to = put_long(put(put_short(properties, "product"), 'S', 1), "sink", 4);
    to = put_long(put(put_short(to, "version"), 'S', 1), "4.0.0", 5);
    to = put_long(put(put_short(to, "capabilities"), 'F', 1), capabilities, length);
    length = to - properties;
    to = put_long(put(arguments, 9, 2), properties, length);
    to = put_long(put_long(to, "PLAIN", 5), "en_US", 5);
    send_method(c, 0, ID(10, 10), arguments, to - arguments);
}

/* -------------------------------------------------------------------------------------------- deliveries */

static char *put_delivery(char *to, int number, const uint8_t *tag, uint64_t delivery_tag, size_t size) {
    static const char route[] = "\0\0\11bench.key"; /* not redelivered, exchange "", routing key */
    static const char properties[] = "\x90\0\30application/octet-stream\1"; /* content type, delivery mode */
    to = put(put_head(to, METHOD, number, 4 + 1 + tag[0] + 8 + 12), ID(60, 60), 4);
    to = put(put_bytes(to, tag, 1 + tag[0]), delivery_tag, 8);
    to = put(put_bytes(to, route, 12), FRAME_END, 1);
    to = put(put_head(to, HEADER, number, 12 + 28), ID(60, 0), 4);
    to = put(put_bytes(put(to, size, 8), properties, 28), FRAME_END, 1);
    while (size) {
        size_t length = size < FRAME_MAX - 8 ? size : FRAME_MAX - 8;
        to = put_head(to, BODY, number, length);
        memset(to, 'x', length);
        to = put(to + length, FRAME_END, 1);
        size -= length;
    }
    return to;
}

static void prepare(channel *ch, int number, const uint8_t *tag, uint64_t n, size_t size) {
    size_t frames = (size + FRAME_MAX - 9) / (FRAME_MAX - 8);
    ch->length = 8 + 4 + 1 + tag[0] + 8 + 12 + 8 + 12 + 28 + 8 * frames + size;
    ch->n = n;
    ch->sent = ch->acked = 0;
    free(ch->deliveries);
    char *to = ch->deliveries = malloc(ch->length * n + 1);
    for (uint64_t delivery_tag = 1; delivery_tag <= n; delivery_tag++)
        to = put_delivery(to, number, tag, delivery_tag, size);
}

static int deliver(connection *c, channel *ch) {
    uint64_t until = ch->n;
    if (!ch->no_ack && ch->prefetch && ch->acked + ch->prefetch < until) until = ch->acked + ch->prefetch;
    if (ch->sent >= until) return 0;
    char *from = ch->deliveries + ch->sent * ch->length;
    size_t length = (until - ch->sent) * ch->length;
    ch->sent = until;
    return flush(c) || write_all(c->fd, from, length);
}

/* ------------------------------------------------------------------------------------------------- input */

static void reset(channel *ch) {
    free(ch->deliveries);
    memset(ch, 0, sizeof *ch);
}

static void on_consume(connection *c, int number, const uint8_t *arguments) {
    channel *ch = &c->channels[number];
    char queue[256] = "";
    memcpy(queue, arguments + 3, arguments[2]);
    const uint8_t *tag = arguments + 3 + arguments[2];
    ch->no_ack = tag[1 + tag[0]] >> 1 & 1;
    if (!tag[0]) tag = (const uint8_t *)"\4sink";
    send_method(c, number, ID(60, 21), (const char *)tag, 1 + tag[0]);
    unsigned long n = 0, size = 0;
    sscanf(queue, "leveret.bench.%lu.%lu", &n, &size);
    prepare(ch, number, tag, n, size);
    ch->touched = 1;
}

static int on_method(connection *c, int number, const uint8_t *payload) {
    channel *ch = &c->channels[number];
    const uint8_t *arguments = payload + 4;
    char reply[300];
    switch (get(payload, 4)) {
    case ID(10, 11): /* connection.start-ok: connection.tune */
        put(put(put(reply, CHANNELS - 1, 2), FRAME_MAX, 4), 60, 2);
        send_method(c, 0, ID(10, 30), reply, 8);
        break;
    case ID(10, 40): send_method(c, 0, ID(10, 41), "", 1); break;
    case ID(10, 50):
        send_method(c, 0, ID(10, 51), "", 0);
        flush(c);
        return -1;
    case ID(20, 10):
        reset(ch);
        send_method(c, number, ID(20, 11), "\0\0\0", 4);
        break;
    case ID(20, 40):
        reset(ch);
        send_method(c, number, ID(20, 41), "", 0);
        break;
    case ID(40, 10): send_method(c, number, ID(40, 11), "", 0); break;
    case ID(50, 10): /* queue.declare: its name, no messages, no consumers */
        put(put_bytes(reply, arguments + 2, 1 + arguments[2]), 0, 8);
        send_method(c, number, ID(50, 11), reply, 1 + arguments[2] + 8);
        break;
    case ID(60, 10):
        ch->prefetch = get(arguments + 4, 2);
        send_method(c, number, ID(60, 11), "", 0);
        break;
    case ID(60, 20): on_consume(c, number, arguments); break;
    case ID(60, 30):
        ch->n = ch->sent;
        send_method(c, number, ID(60, 31), (const char *)arguments, 1 + arguments[0]);
        break;
    case ID(60, 80): /* basic.ack */
        ch->acked = arguments[8] & 1 ? get(arguments, 8) : ch->acked + 1;
        ch->touched = 1;
        break;
    case ID(85, 10):
        ch->confirms = 1;
        send_method(c, number, ID(85, 11), "", 0);
        break;
    }
    return 0;
}

/* What is due on a channel after a read: a confirm of all that was published, deliveries. */
static int settle(connection *c, int number) {
    channel *ch = &c->channels[number];
    ch->touched = 0;
    if (ch->confirms && ch->published > ch->confirmed) {
        char arguments[9];
        put(put(arguments, ch->published, 8), ch->published - ch->confirmed > 1, 1);
        send_method(c, number, ID(60, 80), arguments, 9);
        ch->confirmed = ch->published;
    }
    return deliver(c, ch);
}

static int on_frame(connection *c, const uint8_t *frame, size_t length) {
    int number = get(frame + 1, 2);
    if (number >= CHANNELS || frame[7 + length] != FRAME_END) return -1;
    channel *ch = &c->channels[number];
    const uint8_t *payload = frame + 7;
    if (frame[0] == METHOD) return on_method(c, number, payload);
    if (frame[0] == HEADER) ch->body_left = get(payload + 4, 8);
    else if (frame[0] == BODY) ch->body_left -= length;
    else return 0; /* a heartbeat */
    if (!ch->body_left) {
        ch->published++;
        ch->touched = 1;
    }
    return 0;
}

static void *serve(void *argument) {
    connection *c = argument;
    uint8_t *in = malloc(READ);
    int *touched = malloc(CHANNELS * sizeof *touched);
    size_t have = 0;
    int greeted = 0;
    for (;;) {
        ssize_t got = read(c->fd, in + have, READ - have);
        if (got <= 0) break;
        have += got;
        size_t at = 0;
        int count = 0;
        if (!greeted) { /* the protocol header */
            if (have < 8) continue;
            at = 8;
            greeted = 1;
            send_start(c);
        }
        while (have - at >= 8) {
            size_t length = get(in + at + 3, 4);
            if (have - at < length + 8) break;
            int number = get(in + at + 1, 2);
            int before = number < CHANNELS && c->channels[number].touched;
            if (on_frame(c, in + at, length)) goto end;
            if (!before && c->channels[number].touched) touched[count++] = number;
            at += length + 8;
        }
        memmove(in, in + at, have -= at);
        for (int i = 0; i < count; i++)
            if (settle(c, touched[i])) goto end;
        if (flush(c)) break;
    }
end:
    close(c->fd);
    for (int i = 0; i < CHANNELS; i++) free(c->channels[i].deliveries);
    free(c->out);
    free(c);
    free(in);
    free(touched);
    return NULL;
}

static void *accept_all(void *argument) {
    int fd, listener = *(int *)argument, on = 1;
    while ((fd = accept(listener, NULL, NULL)) >= 0) {
        connection *c = calloc(1, sizeof *c);
        c->fd = fd;
        setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        pthread_t thread;
        pthread_create(&thread, NULL, serve, c);
        pthread_detach(thread);
    }
    return NULL;
}

int main(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (void *)&address, length) || listen(listener, 64)) {
        perror("sink");
        return 1;
    }
    getsockname(listener, (void *)&address, &length);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    signal(SIGPIPE, SIG_IGN);
    pthread_t thread;
    pthread_create(&thread, NULL, accept_all, &listener);
    while (getchar() != EOF) {}
    return 0;
}
