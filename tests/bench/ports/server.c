/* What the connections of the benchmark lead to: one thread, one epoll, no copies that it can avoid.
 *
 *     server PORT      listens on 0.0.0.0, prints "listening", ends when its stdin does
 *
 * The first byte of a connection says what it is for, and is sent back:
 *     S   sink: count what comes; at the end of file send the count (u64, big-endian) and close
 *     G   generator: send as many bytes as the next eight say (u64, big-endian), then an end of file; at the
 *         client's end of file close
 *     E   echo: send back what comes; at the end of file close
 *
 * fallback.py is the same in Python, for hosts without a compiler.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CHUNK = 256 * 1024, BACKLOG = 1024, EVENTS = 64, TURNS = 4, ASKED = 8 };

/* Little enough that 64 connections drain in seconds over a slow peer. */
static const int send_buffer = 128 * 1024;

struct connection {
    int fd;
    char mode; /* 0 until it is known */
    int asked;      /* bytes of the generator's number that have come */
    uint64_t count; /* taken by a sink, left to a generator */
};

static char buffer[CHUNK];

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void watch(int epoll, int operation, int fd, uint32_t events, void *data) {
    struct epoll_event event = {.events = events, .data.ptr = data};
    if (epoll_ctl(epoll, operation, fd, &event) < 0)
        die("epoll_ctl");
}

/* Small answers fit into an empty send buffer; an echo that does not is a mistake of the client's. */
static int answer(int fd, const void *data, size_t length) {
    return send(fd, data, length, MSG_NOSIGNAL) == (ssize_t)length;
}

/* What was read; 0 closes the connection. */
static int take(int epoll, struct connection *c, ssize_t length) {
    char *data = buffer;
    if (!c->mode) {
        c->mode = *data++;
        if (!answer(c->fd, &c->mode, 1))
            return 0;
        length--;
    }
    if (length == 0)
        return 1;
    switch (c->mode) {
    case 'S':
        c->count += length;
        return 1;
    case 'G':
        for (; length > 0 && c->asked < ASKED; length--, c->asked++)
            c->count = c->count << 8 | (unsigned char)*data++;
        if (c->asked == ASKED)
            watch(epoll, EPOLL_CTL_MOD, c->fd, EPOLLIN | EPOLLOUT, c);
        return 1;
    case 'E':
        return answer(c->fd, data, length);
    default:
        return 0;
    }
}

/* The client has sent all: tell it what a sink has counted. */
static void end(struct connection *c) {
    if (c->mode == 'S') {
        uint64_t count = htobe64(c->count);
        answer(c->fd, &count, sizeof count);
    }
}

static int is_over(void) { return errno != EAGAIN && errno != EINTR; }

/* Some more of what a generator has to send; 0 closes the connection. */
static int generate(int epoll, struct connection *c) {
    ssize_t sent = send(c->fd, buffer, c->count < CHUNK ? c->count : CHUNK, MSG_NOSIGNAL);
    if (sent < 0)
        return !is_over();
    c->count -= sent;
    if (c->count == 0) {
        shutdown(c->fd, SHUT_WR);
        watch(epoll, EPOLL_CTL_MOD, c->fd, EPOLLIN, c);
    }
    return 1;
}

/* Some turns of reading and writing; 0 closes the connection. */
static int serve(int epoll, struct connection *c, uint32_t events) {
    for (int turn = 0; events & (EPOLLIN | EPOLLHUP | EPOLLERR) && turn < TURNS; turn++) {
        ssize_t length = recv(c->fd, buffer, CHUNK, 0);
        if (length == 0) {
            end(c);
            return 0;
        }
        if (length < 0) {
            if (is_over())
                return 0;
            break;
        }
        if (!take(epoll, c, length))
            return 0;
        if (length < CHUNK) /* it was all there was */
            break;
    }
    return !(events & EPOLLOUT) || generate(epoll, c);
}

static void accept_one(int epoll, int listener) {
    int one = 1;
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0)
        return;
    struct connection *c = calloc(1, sizeof *c);
    if (!c)
        die("calloc");
    c->fd = fd;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    watch(epoll, EPOLL_CTL_ADD, fd, EPOLLIN, c);
}

static int listening(int port) {
    int one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        die("socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    /* Connections that are accepted have it, too. */
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &send_buffer, sizeof send_buffer);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0)
        die("bind");
    if (listen(fd, BACKLOG) < 0)
        die("listen");
    return fd;
}

int main(int argc, char **argv) {
    static struct connection input, listener;
    struct epoll_event events[EVENTS];
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    if (argc != 2 || epoll < 0)
        die("usage: server PORT");
    listener.fd = listening(atoi(argv[1]));
    watch(epoll, EPOLL_CTL_ADD, listener.fd, EPOLLIN, &listener);
    watch(epoll, EPOLL_CTL_ADD, STDIN_FILENO, EPOLLIN, &input);
    puts("listening");
    fflush(stdout);
    for (;;) {
        int count = epoll_wait(epoll, events, EVENTS, -1);
        if (count < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < count; i++) {
            struct connection *c = events[i].data.ptr;
            if (c == &input) {
                if (read(STDIN_FILENO, buffer, CHUNK) <= 0)
                    return 0;
            } else if (c == &listener) {
                accept_one(epoll, listener.fd);
            } else if (!serve(epoll, c, events[i].events)) {
                close(c->fd);
                free(c);
            }
        }
    }
}
