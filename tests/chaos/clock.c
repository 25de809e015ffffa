/* A clock that jumps for one run alone: LD_PRELOAD this, and write seconds into $CHAOS_CLOCK.

   The wall clock is shifted by them, and deadlines that were taken from it are shifted back before
   the kernel sees them, as if its clock had jumped too. The monotonic clock is left as it is: a
   real jump does not touch it either. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define WALL_CLOCK_BEGINS 1000000000L /* no machine has been up that long */

static long offset(void) {
    static int file = -1;
    char text[32] = {0};
    const char *path = getenv("CHAOS_CLOCK");
    if (file < 0 && path) file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || pread(file, text, sizeof text - 1, 0) <= 0) return 0;
    return atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failure = syscall(SYS_clock_gettime, clock, now);
    if (!failure && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += offset();
    return failure;
}

int gettimeofday(struct timeval *now, void *zone) {
    int failure = syscall(SYS_gettimeofday, now, zone);
    if (!failure) now->tv_sec += offset();
    return failure;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

static struct timespec shifted_back(const struct timespec *deadline) {
    struct timespec real = *deadline;
    if (real.tv_sec > WALL_CLOCK_BEGINS) real.tv_sec -= offset();
    return real;
}

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex,
                           const struct timespec *deadline) {
    static int (*original)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (!original) original = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!original) original = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    struct timespec real = shifted_back(deadline);
    return original(condition, mutex, &real);
}

int sem_timedwait(sem_t *semaphore, const struct timespec *deadline) {
    static int (*original)(sem_t *, const struct timespec *);
    if (!original) original = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec real = shifted_back(deadline);
    return original(semaphore, &real);
}
