/* What differs from one CPU to the next: which instructions it has, which of its cores are fast, how a thread waits. */
#ifndef GRAPHOPT_CPU_H_
#define GRAPHOPT_CPU_H_

#include <stddef.h>

/* True if the CPU has all features, named as Linux names them, with blanks between; else `lacks` names those missing. */
int cpu_has(const char* features, char* lacks, size_t room);

/* Asks the system for what some features need, once for the process; false if it refuses. */
int cpu_prepare(const char* features);

/* Cores that this process may use, at most `room`: fast ones first, and second threads of a core last. */
int cpu_cores(int* cores, int room);

static inline void cpu_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ volatile("yield" ::: "memory");
#endif
}

#endif /* GRAPHOPT_CPU_H_ */
