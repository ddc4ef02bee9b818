#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* affinity of threads */
#endif
#include "cpu.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__aarch64__) || defined(__arm__)
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <sys/syscall.h>
#endif

/* True if a list of words with blanks between has a word. */
static int has_word(const char* list, const char* word, size_t length) {
  for (const char* at = list; (at = strstr(at, word)) != NULL; at += length) {
    int begins = at == list || at[-1] == ' ' || at[-1] == '\t' || at[-1] == ':';
    if (begins && strchr(" \t\n", at[length])) return 1;
  }
  return 0;
}

#if defined(__aarch64__) || defined(__arm__)

/* Names of the bits that the system hands to every program; /proc/cpuinfo would name those of an emulator's host. */
static const char* cpu_features(char* text, size_t room) {
  static const struct {
    int word, bit;
    const char* name;
  } known[] = {
#if defined(__aarch64__)
      {16, 1, "asimd"}, {16, 10, "asimdhp"}, {16, 20, "asimddp"}, {16, 22, "sve"}, {26, 13, "i8mm"}, {26, 14, "bf16"},
#else
      {16, 12, "neon"}, {16, 16, "vfpv4"}, {16, 24, "asimddp"}, {16, 27, "i8mm"}, {16, 26, "asimdbf16"},
#endif
  };
  text[0] = 0;
  for (size_t i = 0; i < sizeof known / sizeof *known; ++i) {
    if (getauxval((unsigned long)known[i].word) >> known[i].bit & 1) {
      strncat(text, known[i].name, room - strlen(text) - 1);
      strncat(text, " ", room - strlen(text) - 1);
    }
  }
  return text;
}

#else

/* What Linux says; NULL where it says nothing. */
static const char* cpu_features(char* text, size_t room) {
  FILE* file = fopen("/proc/cpuinfo", "r");
  const char* found = NULL;
  if (!file) return NULL;
  while (!found && fgets(text, (int)room, file))
    if (strncmp(text, "flags", 5) == 0) found = text;
  fclose(file);
  return found;
}

#endif

int cpu_has(const char* features, char* lacks, size_t room) {
  char text[8192];
  const char* have = cpu_features(text, sizeof text - 1);
  lacks[0] = 0;
  if (!have) return 1;
  for (const char* word = features; *word;) {
    size_t length = strcspn(word, " ");
    char name[64];
    if (length && length < sizeof name) {
      memcpy(name, word, length);
      name[length] = 0;
      if (!has_word(have, name, length)) {
        if (lacks[0]) strncat(lacks, ", ", room - strlen(lacks) - 1);
        strncat(lacks, name, room - strlen(lacks) - 1);
      }
    }
    word += length + strspn(word + length, " ");
  }
  return !lacks[0];
}

int cpu_prepare(const char* features) {
#if defined(__x86_64__)
  if (has_word(features, "amx_tile", 8)) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  }
#endif
  (void)features;
  return 1;
}

/* A number in a file about a core; `otherwise` where there is none. */
static long about_core(int core, const char* what, long otherwise) {
  char path[128], text[64];
  snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/%s", core, what);
  FILE* file = fopen(path, "r");
  long found = otherwise;
  if (file && fgets(text, sizeof text, file)) found = strtol(text, NULL, 10);
  if (file) fclose(file);
  return found;
}

typedef struct {
  int core;
  int second; /* it is another thread of a core with a lower number */
  long capacity;
} candidate;

static int in_order(const void* a, const void* b) {
  const candidate *x = a, *y = b;
  if (x->second != y->second) return x->second - y->second;
  if (x->capacity != y->capacity) return x->capacity > y->capacity ? -1 : 1;
  return x->core - y->core;
}

int cpu_cores(int* cores, int room) {
  cpu_set_t allowed;
  candidate found[CPU_SETSIZE];
  int count = 0;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 0;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (!CPU_ISSET(core, &allowed)) continue;
    found[count].core = core;
    found[count].capacity = about_core(core, "cpu_capacity", 0);
    found[count].second = about_core(core, "topology/thread_siblings_list", core) != core;
    ++count;
  }
  qsort(found, (size_t)count, sizeof *found, in_order);
  if (count > room) count = room;
  for (int i = 0; i < count; ++i) cores[i] = found[i].core;
  return count;
}
