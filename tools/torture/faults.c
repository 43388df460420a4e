// Loaded before the C library: the n-th call that writes to a file, from now on, fails with an error of choice.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/types.h>
#include <unistd.h>

static int left = -1;  // calls until the one that fails; -1: none does
static int failure;    // 0: the process is killed
static int calls;

void torture_fail(int after, int with) { left = after, failure = with, calls = 0; }
int torture_calls(void) { return calls; }

static int fails(void) {
  ++calls;
  if (left < 0 || left-- > 0) return 0;
  if (!failure) kill(getpid(), SIGKILL);
  errno = failure;
  return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void* data, size_t size) {
  return file > 2 && fails() ? -1 : NEXT(write)(file, data, size);
}
int fsync(int file) { return fails() ? -1 : NEXT(fsync)(file); }
int rename(const char* from, const char* to) { return fails() ? -1 : NEXT(rename)(from, to); }
int unlink(const char* path) { return fails() ? -1 : NEXT(unlink)(path); }
int mkdir(const char* path, mode_t mode) { return fails() ? -1 : NEXT(mkdir)(path, mode); }

static mode_t mode_of(int flags, va_list rest) { return flags & O_CREAT ? va_arg(rest, mode_t) : 0; }

int open(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = mode_of(flags, rest);
  va_end(rest);
  return flags & (O_WRONLY | O_RDWR) && fails() ? -1 : NEXT(open)(path, flags, mode);
}
int open64(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = mode_of(flags, rest);
  va_end(rest);
  return flags & (O_WRONLY | O_RDWR) && fails() ? -1 : NEXT(open64)(path, flags, mode);
}
