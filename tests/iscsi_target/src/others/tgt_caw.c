/*
 * Debian's tgtd carries a working compare-and-write that its table of commands doesn't point at: the opcode answers
 * "illegal", while VPD page B0 and the list of opcodes promise it. Preloaded into tgtd, this enters the command.
 *
 * When it runs: tgtd fills its tables in constructors and afterwards opens a directory; so opendir() is the first call
 * that comes late enough. How it finds the disk's table: tgtd's own function for registering a device type is given a
 * dummy, which is thereby linked into the list of all types; from there the list is walked backwards, and the dummy
 * is taken out again. What is laid out as below was checked with tgt 1.0.85 on x86-64; if the entry for opcode 0x89
 * doesn't look like the one for a command that isn't there, nothing is touched and a line says so.
 *
 * With TGT_COVER_UNMAP in the environment, WRITE SAME and UNMAP get the reservation bits of WRITE (16), which
 * tgtd doesn't check for them.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

struct operation {
    int (*perform)(int host, void *command);
    void *service_actions;
    uint8_t conflict_bits;
};

struct node {
    struct node *next;
    struct node *previous;
};

struct device_type {
    unsigned char type;
    void (*functions[6])(void);
    struct operation operations[256];
    struct node node;
};

enum { DISK = 0, UNUSED_TYPE = 0x1e };
enum { WRITE_SAME_10 = 0x41, UNMAP = 0x42, NO_COMMAND = 0x81, SWAP = 0x89, WRITE_16 = 0x8a, WRITE_SAME_16 = 0x93 };

_Static_assert(sizeof(struct operation) == 24, "layout of an entry");
_Static_assert(offsetof(struct device_type, operations) == 56, "layout of the table");

static void enter(void)
{
    static struct device_type dummy = {.type = UNUSED_TYPE};
    int (*add)(struct device_type *) = (int (*)(struct device_type *))dlsym(RTLD_DEFAULT, "device_type_register");
    struct node *at, *head;
    int found = 0;

    if (!add)
        return; /* not tgtd: whatever started it */
    add(&dummy);
    if (!dummy.node.next || !dummy.node.previous) {
        fprintf(stderr, "tgt_caw: another list of device types than expected\n");
        return;
    }
    head = dummy.node.next; /* added at the end, so the head follows */
    for (at = dummy.node.previous; at != head; at = at->previous) {
        struct device_type *type = (struct device_type *)((char *)at - offsetof(struct device_type, node));
        struct operation *all = type->operations;

        if (type->type != DISK || all[SWAP].perform != all[NO_COMMAND].perform || !all[WRITE_16].perform)
            continue;
        all[SWAP] = all[WRITE_16];
        if (getenv("TGT_COVER_UNMAP")) {
            all[WRITE_SAME_10].conflict_bits = all[WRITE_16].conflict_bits;
            all[WRITE_SAME_16].conflict_bits = all[WRITE_16].conflict_bits;
            all[UNMAP].conflict_bits = all[WRITE_16].conflict_bits;
        }
        found = 1;
    }
    dummy.node.previous->next = dummy.node.next;
    dummy.node.next->previous = dummy.node.previous;
    fprintf(stderr, "tgt_caw: compare-and-write %s\n", found ? "entered" : "NOT entered");
}

DIR *opendir(const char *name)
{
    static DIR *(*real)(const char *);

    if (!real) {
        real = (DIR * (*)(const char *)) dlsym(RTLD_NEXT, "opendir");
        enter();
    }
    return real ? real(name) : NULL;
}
