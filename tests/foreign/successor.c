// A service in C that takes over from self-update, and hands over to it.
//
// As a successor it speaks the full protocol where a listening socket was passed on, else the plain one. On SIGHUP it
// is an incumbent of the plain protocol: it starts the program that the variable SUCCESSOR names, and leaves to it.
// It answers one request on each connection, and takes addresses of IPv4: `localhost` is 127.0.0.1 to self-update.
//
//     cc -O2 -o upgrades/successor-c tests/foreign/successor.c

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define VERSION "2.0.0"

enum {
    FIRST_FD = 3,         // of those that are passed on
    CONNECTIONS = 100,    // at a time; more wait in the kernel
    REQUEST_TIME = 10,    // seconds for a request and its answer
    SUCCESSOR_TIME = 30,  // seconds for a successor to stand by
    LOOK_INTERVAL = 20,   // milliseconds between two looks at it
};

struct connection {
    int fd;  // -1 where there is none
    bool is_temporary;
    time_t deadline;
    size_t received, sent, length;  // of the request, and of the answer
    char request[8192], answer[512];
};

static const char *bind_address, *upgrade_bind;
static struct connection connections[CONNECTIONS];
static int inherited = -1;  // the listener that was passed on; not accepted on before /replace
static int service = -1;    // the listener that is accepted on
static int temporary = -1;  // the listener for the incumbent's requests
static bool is_leaving;
static pid_t successor;  // that was started and does not serve yet, or 0
static time_t successor_deadline;

static bool is_healthy(void)
{
    return true;
}

static time_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec;
}

// Returns a socket that listens on HOST:PORT, or is connected to it; -1 where that fails.
static int open_socket(const char *address, bool listens)
{
    const char *colon = strrchr(address, ':');
    char host[256];
    struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *found;
    if (colon == NULL || colon - address >= (ptrdiff_t)sizeof host)
        return -1;
    snprintf(host, sizeof host, "%.*s", (int)(colon - address), address);
    if (getaddrinfo(*host ? host : NULL, colon + 1, &hints, &found) != 0)
        return -1;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | (listens ? SOCK_NONBLOCK : 0), 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));  // connections of the old one linger
    bool is_open = listens ? bind(fd, found->ai_addr, found->ai_addrlen) == 0 && listen(fd, SOMAXCONN) == 0
                           : connect(fd, found->ai_addr, found->ai_addrlen) == 0;
    freeaddrinfo(found);
    if (is_open)
        return fd;
    close(fd);
    return -1;
}

static int listen_on(const char *address)
{
    int fd = open_socket(address, true);
    if (fd < 0) {
        fprintf(stderr, "cannot listen on %s: %s\n", address, strerror(errno));
        exit(1);
    }
    return fd;
}

// ---- The successor -------------------------------------------------------------------------------------------------

// Returns the listening socket that was passed on (sd_listen_fds(3)), or -1.
static int inherited_listener(void)
{
    const char *pid = getenv("LISTEN_PID"), *count = getenv("LISTEN_FDS");
    if (pid == NULL || count == NULL || atol(pid) != getpid() || atoi(count) < 1)
        return -1;
    // Two processes accept on it during a handover: one must not block where the other was first.
    fcntl(FIRST_FD, F_SETFL, fcntl(FIRST_FD, F_GETFL) | O_NONBLOCK);
    return FIRST_FD;
}

// Tells the incumbent how this process stands (sd_notify(3)).
static void announce(const char *text)
{
    const char *name = getenv("NOTIFY_SOCKET");
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (name == NULL || strlen(name) > sizeof address.sun_path)
        return;
    memcpy(address.sun_path, name, strlen(name));
    if (*name == '@')
        address.sun_path[0] = '\0';  // a name without a file (unix(7), abstract)
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    socklen_t size = offsetof(struct sockaddr_un, sun_path) + strlen(name);
    if (sendto(fd, text, strlen(text), 0, (struct sockaddr *)&address, size) < 0)
        perror("cannot announce");
    close(fd);
}

static void stand_by(void)
{
    inherited = inherited_listener();
    temporary = listen_on(upgrade_bind);
    announce(inherited >= 0 ? "READY=1\nX_SELF_UPDATE=1" : "READY=1");
}

// Accepts on the service's address from here on; returns the answer's status. Whoever asks may: the incumbent's secret
// is not asked for, which is optional (successor.js does).
static const char *take_over(void)
{
    if (service < 0)
        service = inherited >= 0 ? inherited : open_socket(bind_address, true);
    if (service < 0)
        return "503 Service Unavailable";
    close(temporary);
    temporary = -1;
    return "200 OK";
}

// ---- The service ---------------------------------------------------------------------------------------------------

static void end(struct connection *connection)
{
    close(connection->fd);
    connection->fd = -1;
}

static struct connection *vacancy(void)
{
    for (struct connection *each = connections; each < connections + CONNECTIONS; each++)
        if (each->fd < 0)
            return each;
    return NULL;
}

// Takes a connection that waits; returns whether there was one.
static bool accept_on(int listener)
{
    struct connection *connection = vacancy();
    int fd = connection ? accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC) : -1;
    if (fd < 0)
        return false;  // there is no room, or another process was first
    connection->fd = fd;
    connection->is_temporary = listener == temporary;
    connection->deadline = now() + REQUEST_TIME;
    connection->received = connection->sent = connection->length = 0;
    return true;
}

// Whether the whole request has arrived: what is left unread when a connection is closed can cost it the answer.
static bool is_complete(const struct connection *connection)
{
    const char *end = strstr(connection->request, "\r\n\r\n");
    if (end == NULL)
        return false;
    const char *field = strcasestr(connection->request, "\r\nContent-Length:");
    size_t body = field && field < end ? strtoul(strchr(field, ':') + 1, NULL, 10) : 0;
    return connection->received - (end + 4 - connection->request) >= body;
}

static void answer(struct connection *connection)
{
    const char *status = is_healthy() ? "200 OK" : "503 Service Unavailable";
    if (strncmp(connection->request, "GET ", 4) != 0)
        status = "400 Bad Request";
    else if (connection->is_temporary && strncmp(connection->request, "GET /replace ", 13) == 0)
        status = take_over();
    char body[64];
    int size = snprintf(body, sizeof body, "{\"version\": \"%s\", \"pid\": %d}", VERSION, getpid());
    connection->length = snprintf(connection->answer, sizeof connection->answer,
                                  "HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
                                  "Connection: close\r\n\r\n%s",
                                  status, size, body);
}

static void receive(struct connection *connection)
{
    size_t room = sizeof connection->request - 1 - connection->received;
    ssize_t count = recv(connection->fd, connection->request + connection->received, room, 0);
    if (count < 0 && errno == EAGAIN)
        return;
    if (count <= 0) {  // the client has gone, or says more than there is room for
        end(connection);
        return;
    }
    connection->received += count;
    connection->request[connection->received] = '\0';
    if (is_complete(connection))
        answer(connection);
}

static void transmit(struct connection *connection)
{
    ssize_t count = send(connection->fd, connection->answer + connection->sent, connection->length - connection->sent,
                         MSG_NOSIGNAL);
    if (count < 0 && errno == EAGAIN)
        return;
    connection->sent += count > 0 ? count : 0;
    if (count < 0 || connection->sent == connection->length)
        end(connection);
}

static void go_on(struct connection *connection, bool is_ready)
{
    if (connection->fd >= 0 && now() > connection->deadline)
        end(connection);
    else if (is_ready && connection->length == 0)
        receive(connection);
    else if (is_ready)
        transmit(connection);
}

// ---- The incumbent -------------------------------------------------------------------------------------------------

static void start_successor(void)
{
    const char *program = getenv("SUCCESSOR");
    if (program == NULL || service < 0 || successor > 0)
        return;
    successor_deadline = now() + SUCCESSOR_TIME;
    successor = fork();
    if (successor != 0)
        return;
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    closefrom(FIRST_FD);  // what this process inherited is not the next one's
    execl(program, program, "-upgrade", "true", "-upgrade-bind", upgrade_bind, "-bind", bind_address, NULL);
    _exit(127);
}

static void end_successor(void)
{
    kill(successor, SIGKILL);
    waitpid(successor, NULL, 0);
    successor = 0;
}

static bool replaces(int connection)
{
    static const char request[] = "GET /replace HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    char status[12];  // HTTP/1.1 200
    struct timeval limit = {.tv_sec = REQUEST_TIME};
    setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    return send(connection, request, strlen(request), MSG_NOSIGNAL) > 0 &&
           recv(connection, status, sizeof status, MSG_WAITALL) == sizeof status && memcmp(status + 8, " 200", 4) == 0;
}

// Nothing tells when a successor of the plain protocol stands by: it does once it listens.
static void look_at_successor(void)
{
    int connection = open_socket(upgrade_bind, false);
    if (connection >= 0) {
        while (accept_on(service))  // the kernel resets what still waits on a listener that is closed
            ;
        close(service);
        service = -1;
        is_leaving = replaces(connection);
        close(connection);
        if (is_leaving) {
            successor = 0;
        } else {
            end_successor();
            service = listen_on(bind_address);
        }
    } else if (waitpid(successor, NULL, WNOHANG) == successor) {
        successor = 0;
    } else if (now() > successor_deadline) {
        end_successor();
    }
}

// ---- The process ----------------------------------------------------------------------------------------------------

static void leave(void)
{
    if (successor > 0)
        end_successor();
    close(service);
    close(temporary);
    service = temporary = -1;
    is_leaving = true;
}

static void take_signal(int signals)
{
    struct signalfd_siginfo arrived;
    if (read(signals, &arrived, sizeof arrived) != sizeof arrived)
        return;
    if (arrived.ssi_signo == SIGHUP)
        start_successor();
    else
        leave();
}

// Waits until something happens, and acts on it.
static void turn(int signals, int busy)
{
    bool is_full = busy == CONNECTIONS;
    struct pollfd polled[3 + CONNECTIONS] = {
        {.fd = signals, .events = POLLIN},
        {.fd = is_full ? -1 : temporary, .events = POLLIN},  // poll(2) passes over -1
        {.fd = is_full ? -1 : service, .events = POLLIN},
    };
    for (int i = 0; i < CONNECTIONS; i++)
        polled[3 + i] = (struct pollfd){.fd = connections[i].fd, .events = connections[i].length ? POLLOUT : POLLIN};
    poll(polled, 3 + CONNECTIONS, successor > 0 ? LOOK_INTERVAL : busy > 0 ? 1000 : -1);
    for (int i = 0; i < CONNECTIONS; i++)
        go_on(&connections[i], polled[3 + i].revents != 0);
    if (polled[1].revents && temporary >= 0)  // no more, where one of those connections asked to replace
        accept_on(temporary);
    if (polled[2].revents)
        accept_on(service);
    if (polled[0].revents)
        take_signal(signals);
    if (successor > 0)
        look_at_successor();
}

static int count_busy(void)
{
    int busy = 0;
    for (int i = 0; i < CONNECTIONS; i++)
        busy += connections[i].fd >= 0;
    return busy;
}

// What the environment says to this process is not said to the next one.
static void forget_incumbent(void)
{
    unsetenv("LISTEN_FDS");
    unsetenv("LISTEN_FDNAMES");
    unsetenv("LISTEN_PID");
    unsetenv("NOTIFY_SOCKET");
    unsetenv("SELF_UPDATE_HANDOVER_FD");
}

// Returns a descriptor that is readable when one of the signals that are handled has arrived.
static int take_signals(void)
{
    sigset_t handled;
    sigemptyset(&handled);
    sigaddset(&handled, SIGHUP);
    sigaddset(&handled, SIGINT);
    sigaddset(&handled, SIGTERM);
    sigprocmask(SIG_BLOCK, &handled, NULL);
    return signalfd(-1, &handled, SFD_CLOEXEC);
}

static const char *flag(char **arguments, const char *name, const char *otherwise)
{
    for (; arguments[0] && arguments[1]; arguments++)
        if (strcmp(arguments[0], name) == 0)
            return arguments[1];
    return otherwise;
}

int main(int count, char **arguments)
{
    if (count == 2 && strcmp(arguments[1], "-version") == 0)
        return puts(VERSION) < 0;
    bind_address = flag(arguments, "-bind", "localhost:8080");
    upgrade_bind = flag(arguments, "-upgrade-bind", "localhost:8081");
    int signals = take_signals();
    for (int i = 0; i < CONNECTIONS; i++)
        connections[i].fd = -1;
    if (strcmp(flag(arguments, "-upgrade", "false"), "true") == 0)
        stand_by();
    else
        service = listen_on(bind_address);
    forget_incumbent();
    for (int busy = 0; !is_leaving || busy > 0; busy = count_busy())
        turn(signals, busy);
    return 0;
}
