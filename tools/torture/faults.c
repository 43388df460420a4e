// Loaded before the C library: the n-th call that writes (or reads) fails with an error of choice, or kills the
// process.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { NONE = -1, WRITES, READS };
static int armed = NONE;
static int left;     // calls until the one that fails
static int failure;  // 0: the process is killed
static int calls;

void torture_fail(int kind, int after, int with) { armed = kind, left = after, failure = with, calls = 0; }
int torture_disarm(void) { return armed = NONE, calls; }

static int fails(int kind) {
  if (armed != kind) return 0;
  ++calls;
  if (left-- != 0) return 0;
  if (!failure) kill(getpid(), SIGKILL);
  errno = failure;
  return 1;
}

static int is_file(int file) {  // pipes between parent and child, and the terminal, are left alone
  struct stat status;
  return fstat(file, &status) == 0 && S_ISREG(status.st_mode);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void* data, size_t size) {
  return is_file(file) && fails(WRITES) ? -1 : NEXT(write)(file, data, size);
}
ssize_t read(int file, void* data, size_t size) {
  return is_file(file) && fails(READS) ? -1 : NEXT(read)(file, data, size);
}
int fsync(int file) { return fails(WRITES) ? -1 : NEXT(fsync)(file); }
int rename(const char* from, const char* to) { return fails(WRITES) ? -1 : NEXT(rename)(from, to); }
int unlink(const char* path) { return fails(WRITES) ? -1 : NEXT(unlink)(path); }
int rmdir(const char* path) { return fails(WRITES) ? -1 : NEXT(rmdir)(path); }
int mkdir(const char* path, mode_t mode) { return fails(WRITES) ? -1 : NEXT(mkdir)(path, mode); }

static mode_t mode_of(int flags, va_list rest) { return flags & O_CREAT ? va_arg(rest, mode_t) : 0; }

#define OPEN(name)                                           \
  int name(const char* path, int flags, ...) {               \
    va_list rest;                                            \
    va_start(rest, flags);                                   \
    mode_t mode = mode_of(flags, rest);                      \
    va_end(rest);                                            \
    int kind = flags & (O_WRONLY | O_RDWR) ? WRITES : READS; \
    return fails(kind) ? -1 : NEXT(name)(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)
