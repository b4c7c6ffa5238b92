/*
 * What libiscsi can do by itself, for comparison: one thread, one session, one loop, AT_ONCE commands under way, each
 * answered one replaced from within its callback. iscsi-perf does the same and knows only reads, all into one buffer;
 * here each command has a buffer of its own, as in a program that wants the data.
 *
 *     bare URL read|write|swap BYTES AT_ONCE SECONDS [callers]
 *
 * prints commands per second and microseconds of CPU time for each. A swap is a COMPARE AND WRITE of one block; each
 * of the AT_ONCE places counts its own block up, and a miscompare ends the program.
 *
 * With "callers" the commands are not replaced from within the callback: AT_ONCE threads ask for one each and wait for its
 * answer, as the callers of a filesystem do, with the least that this takes: a list without a lock, an eventfd only if
 * the loop sleeps, a futex for each. What that costs no caller of the other kind pays.
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <iscsi/iscsi.h>
#include <iscsi/scsi-lowlevel.h>

enum kind { READ, WRITE, SWAP };

struct place {
    unsigned char *data;
    struct scsi_iovec vector;
    uint64_t count;
    int index;
    /* Of a caller: what is behind it in the list, and whether it has its answer. */
    struct place *next;
    atomic_uint answered;
};

static struct iscsi_context *iscsi;
static enum kind kind;
static int lun, under_way, with_callers, wake_fd;
static atomic_int stop, asleep, callers_left;
static _Atomic(struct place *) asked;
static uint32_t block_bytes, bytes;
static uint64_t places, next_place, done;

static double seconds(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

static void fail(const char *what)
{
    fprintf(stderr, "bare: %s: %s\n", what, iscsi_get_error(iscsi));
    exit(1);
}

static void issue(struct place *place);

static void answered(struct iscsi_context *context, int status, void *data, void *private)
{
    (void)context;
    if (status != SCSI_STATUS_GOOD)
        fail("a command failed");
    scsi_free_scsi_task(data);
    under_way--;
    done++;
    if (with_callers) {
        struct place *place = private;

        atomic_store(&place->answered, 1);
        syscall(SYS_futex, &place->answered, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    } else if (!stop) {
        issue(private);
    }
}

static void wake(void)
{
    uint64_t one = 1;

    if (write(wake_fd, &one, sizeof one) != sizeof one)
        fail("eventfd");
}

static void *caller(void *private)
{
    struct place *place = private;

    while (!atomic_load(&stop)) {
        atomic_store(&place->answered, 0);
        place->next = atomic_load(&asked);
        while (!atomic_compare_exchange_weak(&asked, &place->next, place))
            ;
        if (atomic_exchange(&asleep, 0))
            wake();
        while (!atomic_load(&place->answered))
            syscall(SYS_futex, &place->answered, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
    }
    atomic_fetch_sub(&callers_left, 1);
    wake();
    return NULL;
}

static void put64(unsigned char *at, uint64_t value)
{
    for (int i = 0; i < 8; i++)
        at[i] = value >> (56 - 8 * i);
}

static void issue(struct place *place)
{
    unsigned char cdb[16] = {0};
    uint64_t block = (next_place++ % places) * (bytes / block_bytes);
    uint32_t blocks = bytes / block_bytes, length = bytes;
    struct scsi_task *task;

    if (kind == SWAP) {
        block = place->index;
        length = 2 * block_bytes;
        memset(place->data, 0, length);
        put64(place->data, place->count);
        put64(place->data + block_bytes, ++place->count);
        cdb[13] = 1;
    } else {
        cdb[10] = blocks >> 24, cdb[11] = blocks >> 16, cdb[12] = blocks >> 8, cdb[13] = blocks;
    }
    cdb[0] = kind == READ ? 0x88 : kind == WRITE ? 0x8a : 0x89;
    put64(cdb + 2, block);
    task = scsi_create_task(16, cdb, kind == READ ? SCSI_XFER_READ : SCSI_XFER_WRITE, length);
    if (!task)
        fail("no memory");
    place->vector.iov_base = place->data;
    place->vector.iov_len = length;
    if (kind == READ)
        scsi_task_set_iov_in(task, &place->vector, 1);
    else
        scsi_task_set_iov_out(task, &place->vector, 1);
    if (iscsi_scsi_command_async(iscsi, lun, task, answered, NULL, place) != 0)
        fail("a command was not taken");
    under_way++;
}

int main(int argc, char **argv)
{
    struct iscsi_url *url;
    struct scsi_task *task;
    struct scsi_readcapacity16 *capacity;
    struct place *all;
    double since, cpu;
    int at_once;

    if (argc != 6 && argc != 7)
        return 2;
    with_callers = argc == 7;
    kind = !strcmp(argv[2], "read") ? READ : !strcmp(argv[2], "write") ? WRITE : SWAP;
    bytes = atoi(argv[3]);
    at_once = atoi(argv[4]);
    iscsi = iscsi_create_context("iqn.2026-01.org.lunfs:bare");
    url = iscsi_parse_full_url(iscsi, argv[1]);
    if (!url)
        fail("address");
    iscsi_set_noautoreconnect(iscsi, 1);
    iscsi_set_session_type(iscsi, ISCSI_SESSION_NORMAL);
    iscsi_set_header_digest(iscsi, ISCSI_HEADER_DIGEST_NONE_CRC32C);
    iscsi_set_targetname(iscsi, url->target);
    lun = url->lun;
    if (iscsi_full_connect_sync(iscsi, url->portal, lun) != 0)
        fail("login");
    task = iscsi_readcapacity16_sync(iscsi, lun);
    capacity = task ? scsi_datain_unmarshall(task) : NULL;
    if (!capacity)
        fail("capacity");
    block_bytes = capacity->block_length;
    places = (capacity->returned_lba + 1) * block_bytes / bytes;
    scsi_free_scsi_task(task);
    all = calloc(at_once, sizeof *all);
    for (int i = 0; i < at_once; i++) {
        size_t room = bytes > 2 * block_bytes ? bytes : 2 * block_bytes;

        all[i].index = i;
        if (posix_memalign((void **)&all[i].data, 4096, room) != 0)
            fail("no memory");
        memset(all[i].data, 0, room);
    }
    for (int i = 0; kind == SWAP && i < at_once; i++) {
        task = iscsi_write16_sync(iscsi, lun, i, all[i].data, block_bytes, block_bytes, 0, 0, 0, 0, 0);
        if (!task || task->status != SCSI_STATUS_GOOD)
            fail("a write");
        scsi_free_scsi_task(task);
    }
    since = seconds(CLOCK_MONOTONIC);
    cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
    wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    for (int i = 0; i < at_once; i++) {
        pthread_t thread;

        if (!with_callers)
            issue(&all[i]);
        else if (callers_left++, pthread_create(&thread, NULL, caller, &all[i]) != 0)
            fail("a thread");
    }
    while (under_way > 0 || atomic_load(&callers_left) > 0) {
        struct pollfd fds[2] = {{.fd = iscsi_get_fd(iscsi)}, {.fd = wake_fd, .events = POLLIN}};
        uint64_t count;
        int timeout;

        for (struct place *next, *place = atomic_exchange(&asked, NULL); place; place = next) {
            next = place->next;
            issue(place);
        }
        fds[0].events = iscsi_which_events(iscsi);
        atomic_store(&asleep, 1);
        timeout = atomic_load(&asked) ? 0 : 10000;
        if (poll(fds, 1 + with_callers, timeout) <= 0 && timeout > 0)
            fail("no answer");
        atomic_store(&asleep, 0);
        if (fds[1].revents && read(wake_fd, &count, sizeof count) != sizeof count)
            fail("eventfd");
        if (fds[0].revents && iscsi_service(iscsi, fds[0].revents) < 0)
            fail("service");
        if (seconds(CLOCK_MONOTONIC) - since >= atof(argv[5]))
            stop = 1;
    }
    printf("%.1f %.2f\n", done / (seconds(CLOCK_MONOTONIC) - since),
           (seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu) * 1e6 / done);
    return 0;
}
