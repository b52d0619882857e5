/* Every way to read gives the same bytes: whole pages, ragged ends, many at once; and says what it
 * cannot. FAULTS 2, 5, 6. */
#include "experts/disk.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { PAGES = 300, BYTES = PAGES * CHOIR_DISK_PAGE + 1234, N_READS = 500 };

static char path[64];
static uint8_t *content;

static int make_file(void **state)
{
    (void)state;
    content = malloc(BYTES);
    for (uint32_t i = 0; i < BYTES; i++) content[i] = (uint8_t)(i * 2654435761U >> 13);
    snprintf(path, sizeof path, "/var/tmp/disk_test-XXXXXX");
    int fd = mkstemp(path);
    ssize_t n = write(fd, content, BYTES);
    close(fd);
    return n == BYTES ? 0 : -1;
}

static int remove_file(void **state)
{
    (void)state;
    unlink(path);
    free(content);
    return 0;
}

static choir_disk *open_disk(choir_io io, uint32_t depth)
{
    choir_disk *disk;
    if (choir_disk_open(io, depth, &disk) == CHOIR_OK) return disk;
    print_message("[ SKIPPED ] %s: %s\n", choir_io_text(io), choir_error_message());
    return NULL;
}

static void test_reads(void **state)
{
    (void)state;
    for (int io = CHOIR_IO_AUTO; io < CHOIR_N_IO; io++)
        for (uint32_t depth = 1; depth <= 64; depth *= 8) {
            choir_disk *disk = open_disk((choir_io)io, depth);
            if (disk == NULL) continue;
            int fd;
            uint64_t bytes, state_ = 7;
            bool direct;
            assert_int_equal(choir_disk_open_file(path, &fd, &bytes, &direct), CHOIR_OK);
            assert_int_equal(bytes, BYTES);
            disk->use_file(disk, fd);
            size_t room = 16 * CHOIR_DISK_PAGE;
            uint8_t *memory = choir_alloc_pages(CHOIR_MEM_EXPERTS, N_READS * room);
            disk->use_memory(disk, memory, N_READS * room, true);
            choir_read reads[N_READS];
            for (uint32_t i = 0; i < N_READS; i++) {
                state_ = state_ * UINT64_C(6364136223846793005) + 1442695040888963407;
                uint32_t page = (uint32_t)(state_ >> 33) % PAGES,
                         n = 1 + (uint32_t)(state_ >> 50) % 16;
                uint64_t offset = (uint64_t)page * CHOIR_DISK_PAGE, left = BYTES - offset;
                uint32_t most = n * CHOIR_DISK_PAGE;
                reads[i] = (choir_read){
                    fd, offset, memory + i * room, most, left < most ? (uint32_t)left : most, i};
            }
            bool seen[N_READS] = {false};
            for (uint32_t sent = 0, got = 0; got < N_READS;) {
                choir_read_done done[16];
                sent += disk->submit(disk, reads + sent, N_READS - sent);
                uint32_t n = disk->reap(disk, done, 16, 10 * CHOIR_SECOND);
                assert_true(n > 0);
                for (uint32_t i = 0; i < n; i++, got++) {
                    const choir_read *r = &reads[done[i].tag];
                    assert_int_equal(done[i].error, 0);
                    assert_false(seen[done[i].tag]);
                    seen[done[i].tag] = true;
                    assert_memory_equal(r->to, content + r->offset, r->need);
                }
            }
            disk->use_memory(disk, memory, N_READS * room, false);
            disk->close(disk);
            choir_free_pages(CHOIR_MEM_EXPERTS, memory, N_READS * room);
            close(fd);
        }
}

/* A file that became shorter, and one that cannot be read at all. */
static void test_failures(void **state)
{
    (void)state;
    for (int io = CHOIR_IO_AUTO; io < CHOIR_N_IO; io++) {
        choir_disk *disk = open_disk((choir_io)io, 8);
        if (disk == NULL) continue;
        int fd, writable = open(path, O_WRONLY);
        uint64_t bytes;
        bool direct;
        choir_read_done done[4];
        uint8_t *memory = choir_alloc_pages(CHOIR_MEM_EXPERTS, 1 << 20);
        assert_int_equal(choir_disk_open_file(path, &fd, &bytes, &direct), CHOIR_OK);
        const choir_read beyond = {
            fd, (PAGES - 1) * CHOIR_DISK_PAGE, memory, 4 * CHOIR_DISK_PAGE, 4 * CHOIR_DISK_PAGE, 1};
        const choir_read unreadable = {writable, 0, memory, CHOIR_DISK_PAGE, CHOIR_DISK_PAGE, 2};
        assert_int_equal(disk->submit(disk, &beyond, 1), 1);
        assert_int_equal(disk->reap(disk, done, 4, 10 * CHOIR_SECOND), 1);
        assert_int_equal(done[0].error, ENODATA);
        assert_int_equal(disk->submit(disk, &unreadable, 1), 1);
        assert_int_equal(disk->reap(disk, done, 4, 10 * CHOIR_SECOND), 1);
        assert_int_equal(done[0].tag, 2);
        assert_int_equal(done[0].error, EBADF);
        assert_int_equal(disk->reap(disk, done, 4, CHOIR_SECOND),
                         0); /* nothing in flight: no wait */
        disk->close(disk);
        choir_free_pages(CHOIR_MEM_EXPERTS, memory, 1 << 20);
        close(fd);
        close(writable);
    }
    choir_disk *disk;
    int fd;
    uint64_t bytes;
    bool direct;
    assert_int_equal(choir_disk_open(CHOIR_IO_PREAD, 0, &disk), CHOIR_E_INVALID);
    assert_int_equal(choir_disk_open_file("/nowhere", &fd, &bytes, &direct), CHOIR_E_NOT_FOUND);
    assert_int_equal(choir_disk_open_file("/dev/null", &fd, &bytes, &direct), CHOIR_E_INVALID);
}

static void test_lack_of_memory(void **state)
{
    (void)state;
    for (int io = CHOIR_IO_URING_PLAIN; io < CHOIR_N_IO; io++)
        for (uint64_t i = 1; i <= 3; i++) {
            choir_disk *disk;
            choir_memory_fail_at(i);
            choir_status status = choir_disk_open((choir_io)io, 8, &disk);
            choir_memory_fail_at(0);
            assert_int_equal(status, CHOIR_E_NO_MEMORY);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reads),
        cmocka_unit_test(test_failures),
        cmocka_unit_test(test_lack_of_memory),
    };
    return cmocka_run_group_tests(tests, make_file, remove_file);
}
