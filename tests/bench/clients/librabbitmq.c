/* librabbitmq-c: a worker of its own. librabbitmq SCENARIO URL N SIZE */
#include <amqp.h>
#include <amqp_tcp_socket.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

static const char *url;
static long n, size;
static double cpu_begun, wall_begun;

static double wall(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static double cpu(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static void start(void) {
    cpu_begun = cpu();
    wall_begun = wall();
}

static int report(void) {
    double seconds = wall() - wall_begun;
    printf("{\"cpu_us\": %.6f, \"per_second\": %.3f}\n", (cpu() - cpu_begun) / n * 1e6, n / seconds);
    return 0;
}

static void need(int good, const char *what) {
    if (good) return;
    fprintf(stderr, "librabbitmq: %s failed\n", what);
    exit(1);
}

static amqp_connection_state_t open_channel(void) {
    struct amqp_connection_info info;
    amqp_default_connection_info(&info);
    need(!amqp_parse_url(strdup(url), &info), "parsing the URL");
    amqp_connection_state_t connection = amqp_new_connection();
    need(!amqp_socket_open(amqp_tcp_socket_new(connection), info.host, info.port), "connecting");
    const char *vhost = *info.vhost ? info.vhost : "/"; /* as the Python clients read a URL that ends in a slash */
    amqp_rpc_reply_t reply =
        amqp_login(connection, vhost, 0, 131072, 0, AMQP_SASL_METHOD_PLAIN, info.user, info.password);
    need(reply.reply_type == AMQP_RESPONSE_NORMAL, "the login");
    need(amqp_channel_open(connection, 1) != NULL, "opening a channel");
    return connection;
}

static int connect_all(void) {
    start();
    for (long i = 0; i < n; i++) {
        amqp_connection_state_t connection = open_channel();
        amqp_connection_close(connection, AMQP_REPLY_SUCCESS);
        amqp_destroy_connection(connection);
    }
    return report();
}

/* Wait until *confirmed*, a count, is *until*. */
static void wait_for_confirms(amqp_connection_state_t connection, uint64_t *confirmed, uint64_t until) {
    while (*confirmed < until) {
        amqp_frame_t frame;
        amqp_maybe_release_buffers(connection);
        need(amqp_simple_wait_frame(connection, &frame) == AMQP_STATUS_OK, "waiting for confirms");
        if (frame.frame_type != AMQP_FRAME_METHOD || frame.payload.method.id != AMQP_BASIC_ACK_METHOD) continue;
        amqp_basic_ack_t *ack = frame.payload.method.decoded;
        *confirmed = ack->multiple ? ack->delivery_tag : *confirmed + 1;
    }
}

/* *window* messages in flight; 0: without confirms. */
static int publish(const char *exchange, const char *key, int delivery_mode, long window) {
    amqp_connection_state_t connection = open_channel();
    amqp_bytes_t body = {size, calloc(1, size + 1)};
    uint64_t confirmed = 0;
    if (window) need(amqp_confirm_select(connection, 1) != NULL, "confirm.select");
    start();
    for (long i = 1; i <= n; i++) {
        amqp_basic_properties_t properties = {
            ._flags = AMQP_BASIC_CONTENT_TYPE_FLAG | AMQP_BASIC_DELIVERY_MODE_FLAG,
            .content_type = amqp_cstring_bytes("application/octet-stream"),
            .delivery_mode = delivery_mode,
        };
        int failed = amqp_basic_publish(
            connection, 1, amqp_cstring_bytes(exchange), amqp_cstring_bytes(key), 0, 0, &properties, body);
        need(!failed, "publishing");
        if (window && (i % window == 0 || i == n)) wait_for_confirms(connection, &confirmed, i);
    }
    amqp_basic_qos(connection, 1, 0, 1, 0);
    return report();
}

static int consume(int prefetch) {
    amqp_connection_state_t connection = open_channel();
    char queue[100];
    snprintf(queue, sizeof queue, "leveret.bench.%ld.%ld", n, size);
    if (prefetch) amqp_basic_qos(connection, 1, 0, prefetch, 0);
    start();
    amqp_basic_consume(
        connection, 1, amqp_cstring_bytes(queue), amqp_empty_bytes, 0, !prefetch, 0, amqp_empty_table);
    for (long i = 0; i < n; i++) {
        amqp_envelope_t envelope;
        amqp_maybe_release_buffers(connection);
        amqp_rpc_reply_t reply = amqp_consume_message(connection, &envelope, NULL, 0);
        need(reply.reply_type == AMQP_RESPONSE_NORMAL, "consuming");
        if (prefetch) amqp_basic_ack(connection, 1, envelope.delivery_tag, 0);
        amqp_destroy_envelope(&envelope);
    }
    amqp_basic_qos(connection, 1, 0, 1, 0);
    return report();
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    const char *scenario = argv[1];
    url = argv[2];
    n = atol(argv[3]);
    size = atol(argv[4]);
    char queue[100];
    snprintf(queue, sizeof queue, "leveret.bench.%ld.%ld", n, size);
    if (!strcmp(scenario, "connect")) return connect_all();
    if (!strcmp(scenario, "pub")) return publish("leveret.bench", "key", 1, 0);
    if (!strcmp(scenario, "pubc1")) return publish("leveret.bench", "key", 1, 1);
    if (!strcmp(scenario, "pubc1000") || !strcmp(scenario, "pubmany")) return publish("leveret.bench", "key", 1, 1000);
    if (!strcmp(scenario, "pubq")) return publish("", queue, 2, 1000);
    if (!strcmp(scenario, "con_noack")) return consume(0);
    if (!strcmp(scenario, "con_cb100") || !strcmp(scenario, "con_it100")) return consume(100);
    if (!strcmp(scenario, "con_cb1000") || !strcmp(scenario, "con_it1000")) return consume(1000);
    printf("null\n");
    return 0;
}
