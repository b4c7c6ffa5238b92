/*
 * A device that fails on command: preloaded into a daemon, it stands between the daemon and the system calls on its
 * image. The rules lie in a file that the test changes while the daemon runs (tests/faults/mod.rs). Faults are one
 * process's own, as those of a path are: another daemon on the same image does not see them.
 *
 * Not for: faults of the kernel's own (a full filesystem, a device that is write protected); tests make those for real.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { RULES = 4, READ = 1, WRITE = 2, FLUSH = 4, SHARED_LOCK = 8 };
enum { FAIL_EIO = 1, DONE_THEN_EIO = 2, SHORT = 3, HANG = 4, TORN_THEN_EIO = 5 };

/* As in mod.rs. `left` counts down to zero, then the rule is over. */
struct rule {
    _Atomic uint64_t active, kinds, from, to, action, left, hits, unused;
};

static struct rule *rules;
static dev_t image_dev;
static ino_t image_ino;

__attribute__((constructor)) static void start(void) {
    const char *control = getenv("LUNFS_FAULTS"), *image = getenv("LUNFS_FAULTS_IMAGE");
    struct stat s;
    if (!control || !image || stat(image, &s) != 0)
        return;
    int fd = open(control, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return;
    void *at = mmap(NULL, RULES * sizeof(struct rule), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (at == MAP_FAILED)
        return;
    image_dev = s.st_dev;
    image_ino = s.st_ino;
    rules = at;
}

/* The first rule that this command meets; counts it. */
static struct rule *met(int fd, uint64_t kind, uint64_t at, uint64_t len) {
    struct stat s;
    if (!rules)
        return NULL;
    for (struct rule *r = rules; r < rules + RULES; r++) {
        if (!r->active || !(r->kinds & kind))
            continue;
        if (kind != FLUSH && (at + len <= r->from || at >= r->to))
            continue;
        if (fstat(fd, &s) != 0 || s.st_dev != image_dev || s.st_ino != image_ino)
            return NULL;
        uint64_t left = r->left;
        do {
            if (left == 0)
                break;
        } while (!atomic_compare_exchange_weak(&r->left, &left, left - 1));
        if (left == 0)
            continue;
        r->hits++;
        return r;
    }
    return NULL;
}

static int fail(int error) {
    errno = error;
    return -1;
}

/* Until the rule is taken away. */
static void wait_for(struct rule *r) {
    while (r->action == HANG && r->active)
        usleep(1000);
}

/* Half of it, in whole logical blocks; all where it is no more than one. */
static size_t half(size_t len) {
    size_t some = len / 2 / 512 * 512;
    return some ? some : len;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define TRANSFER(name, kind, buffer)                                    \
    ssize_t name(int fd, buffer *buf, size_t len, off64_t at) {         \
        static __typeof__(&name) real;                                  \
        if (!real)                                                      \
            real = REAL(name);                                          \
        struct rule *r = met(fd, kind, (uint64_t)at, len);              \
        if (!r)                                                         \
            return real(fd, buf, len, at);                              \
        switch (r->action) {                                            \
        case FAIL_EIO:                                                  \
            return fail(EIO);                                           \
        case DONE_THEN_EIO:                                             \
            return real(fd, buf, len, at) < 0 ? -1 : fail(EIO);         \
        case TORN_THEN_EIO:                                             \
            return real(fd, buf, half(len), at) < 0 ? -1 : fail(EIO);   \
        case SHORT:                                                     \
            return real(fd, buf, half(len), at);                        \
        default:                                                        \
            wait_for(r);                                                \
            return real(fd, buf, len, at);                              \
        }                                                               \
    }

TRANSFER(pread64, READ, void)
TRANSFER(pwrite64, WRITE, const void)

int fdatasync(int fd) {
    static int (*real)(int);
    if (!real)
        real = REAL(fdatasync);
    struct rule *r = met(fd, FLUSH, 0, 0);
    if (!r)
        return real(fd);
    switch (r->action) {
    case FAIL_EIO:
        return fail(EIO);
    case DONE_THEN_EIO:
    case TORN_THEN_EIO:
        return real(fd) < 0 ? -1 : fail(EIO);
    default:
        wait_for(r);
        return real(fd);
    }
}

/* Byte-range locks: the gate through which every change of the image passes is one. */
int fcntl(int fd, int cmd, ...) {
    static int (*real)(int, int, ...);
    if (!real)
        real = (int (*)(int, int, ...))dlsym(RTLD_NEXT, "fcntl");
    va_list arguments;
    va_start(arguments, cmd);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (cmd == F_OFD_SETLK && ((struct flock *)argument)->l_type == F_RDLCK) {
        struct flock *lock = argument;
        struct rule *r = met(fd, SHARED_LOCK, (uint64_t)lock->l_start, (uint64_t)lock->l_len);
        if (r)
            wait_for(r);
    }
    return real(fd, cmd, argument);
}
