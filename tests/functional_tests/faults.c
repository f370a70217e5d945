/* Loaded before libc (LD_PRELOAD): system calls that change or read files fail, or end the process.

   FAULT_IN     part of a path: only calls on files whose path has it count
   FAULT_CALL   one of the functions below; with it, every such call fails
   FAULT_ERRNO  with what it fails
   FAULT_KILL   number of the call, of those that change files, before which the process is killed
   FAULT_COUNT  file that is told, at the end, how many calls there were that change files */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long changes;

static int is_meant(const char *path) {
    const char *in = getenv("FAULT_IN");
    return in && path && strstr(path, in) != NULL;
}

static int is_open_at(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_meant(path);
}

static int fails(const char *call) {
    const char *asked = getenv("FAULT_CALL");
    if (!asked || strcmp(asked, call)) return 0;
    errno = atoi(getenv("FAULT_ERRNO"));
    return 1;
}

static void count_change(void) {
    const char *kill_at = getenv("FAULT_KILL");
    long number = atomic_fetch_add(&changes, 1) + 1;
    if (kill_at && number == atol(kill_at)) raise(SIGKILL);
}

__attribute__((destructor)) static void tell(void) {
    const char *file = getenv("FAULT_COUNT");
    FILE *out = file ? fopen(file, "w") : NULL;
    if (!out) return;
    fprintf(out, "%ld", atomic_load(&changes));
    fclose(out);
}

/* name: of the function; call: what FAULT_CALL names it; changed: whether it changes files. */
#define REPLACE(type, name, call, parameters, arguments, meant, changed)      \
    type name parameters {                                                    \
        static type(*original) parameters;                                    \
        if (!original) *(void **)&original = dlsym(RTLD_NEXT, #name);         \
        int before = errno;                                                   \
        if (meant) {                                                          \
            if (changed) count_change();                                      \
            if (fails(call)) return -1;                                       \
        }                                                                     \
        errno = before;                                                       \
        return original arguments;                                            \
    }

#define ON_FD(name, call, parameters, arguments, changed) \
    REPLACE(ssize_t, name, call, parameters, arguments, is_open_at(fd), changed)

ON_FD(read, "read", (int fd, void *to, size_t n), (fd, to, n), 0)
ON_FD(pread, "pread", (int fd, void *to, size_t n, off_t at), (fd, to, n, at), 0)
ON_FD(pread64, "pread", (int fd, void *to, size_t n, off64_t at), (fd, to, n, at), 0)
ON_FD(preadv, "pread", (int fd, const struct iovec *to, int n, off_t at), (fd, to, n, at), 0)
ON_FD(preadv64, "pread", (int fd, const struct iovec *to, int n, off64_t at), (fd, to, n, at), 0)
ON_FD(preadv2, "pread", (int fd, const struct iovec *to, int n, off_t at, int flags),
      (fd, to, n, at, flags), 0)
ON_FD(preadv64v2, "pread", (int fd, const struct iovec *to, int n, off64_t at, int flags),
      (fd, to, n, at, flags), 0)
ON_FD(write, "write", (int fd, const void *from, size_t n), (fd, from, n), 1)
ON_FD(pwrite, "pwrite", (int fd, const void *from, size_t n, off_t at), (fd, from, n, at), 1)
ON_FD(pwrite64, "pwrite", (int fd, const void *from, size_t n, off64_t at), (fd, from, n, at), 1)

REPLACE(ssize_t, copy_file_range, "copy",
        (int from, off64_t * from_at, int to, off64_t *to_at, size_t n, unsigned flags),
        (from, from_at, to, to_at, n, flags), is_open_at(from) || is_open_at(to), 1)
REPLACE(ssize_t, sendfile, "copy", (int to, int from, off_t *at, size_t n), (to, from, at, n),
        is_open_at(from) || is_open_at(to), 1)
REPLACE(ssize_t, sendfile64, "copy", (int to, int from, off64_t *at, size_t n),
        (to, from, at, n), is_open_at(from) || is_open_at(to), 1)

REPLACE(int, fsync, "fsync", (int fd), (fd), is_open_at(fd), 1)
REPLACE(int, ftruncate64, "truncate", (int fd, off64_t n), (fd, n), is_open_at(fd), 1)
REPLACE(int, truncate64, "truncate", (const char *path, off64_t n), (path, n), is_meant(path), 1)
REPLACE(int, rename, "rename", (const char *from, const char *to), (from, to), is_meant(to), 1)
REPLACE(int, mkdir, "mkdir", (const char *path, mode_t mode), (path, mode), is_meant(path), 1)
REPLACE(int, rmdir, "rmdir", (const char *path), (path), is_meant(path), 1)
REPLACE(int, unlink, "unlink", (const char *path), (path), is_meant(path), 1)
REPLACE(int, unlinkat, "unlink", (int fd, const char *path, int flags), (fd, path, flags),
        is_meant(path) || is_open_at(fd), 1)

/* This one returns its error. */
int posix_fallocate64(int fd, off64_t at, off64_t n) {
    static int (*original)(int, off64_t, off64_t);
    if (!original) *(void **)&original = dlsym(RTLD_NEXT, "posix_fallocate64");
    if (is_open_at(fd)) {
        count_change();
        if (fails("allocate")) return errno;
    }
    return original(fd, at, n);
}
