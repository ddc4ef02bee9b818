/* What runs a compiled model: its memory, and a team of threads that walks through its steps together.
 *
 * Every thread executes the same entry function, computes its share of each step and meets the others behind it.
 * Threads that have nothing to do spin for a moment, because the next run mostly follows soon, and then sleep.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* affinity of threads */
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "cpu.h"
#include "graphopt.h"
#include "loops.h"

enum { PAGE = 4096, HUGE_PAGE = 2 << 20, SPINS = 20000, PATIENCE = 2000, MOST_THREADS = 256 };

typedef struct {
  graphopt_model* model;
  pthread_t thread;
  atomic_int number; /* the system's, 0 until it has started */
  int task;
  int core; /* that it is bound to; -1: none */
} worker;

struct graphopt_model {
  const uint8_t* weights;
  size_t mapped; /* bytes to unmap; 0: the weights are in the library */
  void* workspace;
  size_t workspace_bytes;
  int threads;
  worker* workers;
  int home; /* core that no worker is bound to */
  uint64_t* times;
  uint64_t last;
  unsigned born; /* forks of this process when the threads were started */
  /* the run: */
  const void* const* inputs;
  void* const* outputs;
  atomic_uint runs; /* counts up when there is work */
  atomic_int sleeping;
  atomic_int leave;
  pthread_mutex_t mutex;
  pthread_cond_t wake;
  /* behind a step: */
  _Alignas(64) atomic_uint arrived;
  _Alignas(64) atomic_uint phase;
};

/* Made by the compiler, for each model: calls the entry function with pointers in its order. */
void graphopt_enter(
    const void* const* inputs, void* const* outputs, const void* weights, void* workspace, void* model, int32_t task,
    int32_t tasks);
extern const graphopt_description graphopt_this;
extern const uint8_t* const graphopt_embedded_weights;

const graphopt_description* graphopt_describe(void) { return &graphopt_this; }

static uint64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Called by every thread behind every step; `meet`: the next one needs what the others did. */
void graphopt_behind(void* state, int32_t task, int32_t tasks, int32_t step, int32_t meet) {
  graphopt_model* model = state;
  if (tasks > 1 && meet) {
    unsigned phase = atomic_load_explicit(&model->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&model->arrived, 1, memory_order_acq_rel) + 1 == (unsigned)tasks) {
      atomic_store_explicit(&model->arrived, 0, memory_order_relaxed);
      atomic_store_explicit(&model->phase, phase + 1, memory_order_release);
    } else {
      for (int spins = 0; atomic_load_explicit(&model->phase, memory_order_acquire) == phase; ++spins) {
        if (spins < PATIENCE)
          cpu_relax();
        else
          sched_yield(); /* there are fewer cores than threads */
      }
    }
  }
  if (model->times && task == 0) {
    uint64_t time = now();
    model->times[step] += time - model->last;
    model->last = time;
  }
}

static void enter(graphopt_model* model, int task) {
  graphopt_enter(model->inputs, model->outputs, model->weights, model->workspace, model, task, model->threads);
}

static void* work(void* argument) {
  worker* self = argument;
  graphopt_model* model = self->model;
  unsigned done = 0;
  atomic_store(&self->number, (int)syscall(SYS_gettid));
  for (;;) {
    int spins = 0;
    while (atomic_load_explicit(&model->runs, memory_order_acquire) == done && ++spins < SPINS) cpu_relax();
    if (atomic_load(&model->runs) == done) {
      pthread_mutex_lock(&model->mutex);
      atomic_fetch_add(&model->sleeping, 1);
      while (atomic_load(&model->runs) == done) pthread_cond_wait(&model->wake, &model->mutex);
      atomic_fetch_sub(&model->sleeping, 1);
      pthread_mutex_unlock(&model->mutex);
    }
    ++done;
    if (atomic_load(&model->leave)) return NULL;
    enter(model, self->task);
  }
}

static void call_workers(graphopt_model* model) {
  atomic_fetch_add(&model->runs, 1);
  if (atomic_load(&model->sleeping)) {
    pthread_mutex_lock(&model->mutex);
    pthread_cond_broadcast(&model->wake);
    pthread_mutex_unlock(&model->mutex);
  }
}

static void bind_worker(worker* self, int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  while (!atomic_load(&self->number)) sched_yield();
  self->core = sched_setaffinity(atomic_load(&self->number), sizeof set, &set) == 0 ? core : -1;
}

static unsigned forks;
static void count_fork(void) { ++forks; }
static void watch_forks(void) { pthread_atfork(NULL, NULL, count_fork); }

/* Starts the workers, each on a core of its own where there are enough. */
static int start(graphopt_model* model) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, watch_forks);
  model->born = forks;
  atomic_store(&model->runs, 0);
  atomic_store(&model->sleeping, 0);
  atomic_store(&model->arrived, 0);
  if (pthread_mutex_init(&model->mutex, NULL) || pthread_cond_init(&model->wake, NULL)) return 0;
  int cores[MOST_THREADS];
  int count = cpu_cores(cores, MOST_THREADS), next = 0;
  int bound = count >= model->threads;
  if (bound) {
    model->home = sched_getcpu();
    int own = -1;
    for (int i = 0; i < count; ++i)
      if (cores[i] == model->home) own = i;
    if (own < 0 || own >= model->threads) { /* the caller will be drawn to where it is faster */
      own = 0;
      model->home = cores[0];
    }
    next = own == 0;
  }
  for (int i = 0; i < model->threads - 1; ++i) {
    worker* self = &model->workers[i];
    self->model = model;
    self->task = i + 1;
    self->core = -1;
    atomic_store(&self->number, 0);
    if (pthread_create(&self->thread, NULL, work, self)) return 0;
    if (bound) {
      bind_worker(self, cores[next]);
      do ++next;
      while (next < count && cores[next] == model->home);
    }
  }
  return 1;
}

/* The system moved the caller to the core of a worker: they change places. */
static void make_room(graphopt_model* model) {
  int core = sched_getcpu();
  if (core == model->home) return;
  for (int i = 0; i < model->threads - 1; ++i) {
    if (model->workers[i].core == core) {
      bind_worker(&model->workers[i], model->home);
      model->home = core;
      return;
    }
  }
}

static void* page_aligned(size_t size) {
  void* memory = NULL;
  size_t align = size >= 2 * HUGE_PAGE ? HUGE_PAGE : PAGE;
  if (posix_memalign(&memory, align, size)) return NULL;
#ifdef MADV_HUGEPAGE
  if (align == HUGE_PAGE) madvise(memory, size, MADV_HUGEPAGE);
#endif
  memset(memory, 0, size);
  return memory;
}

/* Maps the file of weights: a line that names its bytes and digest, padded to a page, and then the weights. */
static const char* map_weights(graphopt_model* model, const char* path) {
  if (!path) return "the model needs its file of weights";
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return "cannot open the file of weights";
  char head[PAGE] = {0}, expected[PAGE];
  struct stat status;
  int fits = fstat(file, &status) == 0 && read(file, head, PAGE - 1) > 0;
  snprintf(expected, PAGE, "graphopt weights 1 %llu %s\n", (unsigned long long)graphopt_this.weight_bytes,
           graphopt_this.weight_digest);
  if (!fits || strncmp(head, expected, strlen(expected)) != 0) {
    close(file);
    return "the file of weights belongs to another model";
  }
  if ((uint64_t)status.st_size < PAGE + graphopt_this.weight_bytes) {
    close(file);
    return "the file of weights is cut short";
  }
  model->mapped = (size_t)(PAGE + graphopt_this.weight_bytes);
  uint8_t* memory = mmap(NULL, model->mapped, PROT_READ, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) {
    model->mapped = 0;
    return "cannot map the file of weights";
  }
  model->weights = memory + PAGE;
  return NULL;
}

graphopt_model* graphopt_open(const char* weights, int threads, char* message, size_t room) {
  char lacks[256];
  if (!cpu_has(graphopt_this.features, lacks, sizeof lacks)) {
    snprintf(message, room, "compiled for %s: this CPU lacks %s", graphopt_this.target, lacks);
    return NULL;
  }
  graphopt_model* model = NULL;
  if (posix_memalign((void**)&model, 64, sizeof *model)) {
    snprintf(message, room, "out of memory");
    return NULL;
  }
  memset(model, 0, sizeof *model);
  model->threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
  const char* fault = NULL;
  if (graphopt_embedded_weights)
    model->weights = graphopt_embedded_weights;
  else
    fault = map_weights(model, weights);
  if (!fault) {
    model->workspace_bytes =
        (size_t)(graphopt_this.workspace_bytes + (uint64_t)model->threads * graphopt_this.thread_bytes);
    model->workspace = page_aligned(model->workspace_bytes);
    model->workers = calloc((size_t)model->threads, sizeof *model->workers);
    if (!model->workspace || !model->workers) fault = "out of memory";
  }
  if (!fault && !cpu_prepare(graphopt_this.features)) fault = "the system refuses the CPU's matrix registers";
  if (!fault && model->threads > 1 && !start(model)) fault = "cannot start threads";
  if (!fault) return model;
  snprintf(message, room, "%s", fault);
  model->threads = 1;
  graphopt_close(model);
  return NULL;
}

void graphopt_run(graphopt_model* model, const void* const* inputs, void* const* outputs) {
  model->inputs = inputs;
  model->outputs = outputs;
  if (model->threads > 1) {
    if (model->born != forks) start(model); /* a child process has no threads but its first */
    make_room(model);
    call_workers(model);
  }
  enter(model, 0);
}

void graphopt_profile(graphopt_model* model, const void* const* inputs, void* const* outputs, uint64_t* times) {
  model->times = times;
  model->last = now();
  graphopt_run(model, inputs, outputs);
  model->times = NULL;
}

double graphopt_peak(const char* arithmetic) {
  enum { BYTES = 4096, TURNS = 20000, TRIALS = 50 };
  static const uint8_t operands[BYTES] __attribute__((aligned(64)));
  uint8_t sums[BYTES] __attribute__((aligned(64)));
  for (const graphopt_loop* loop = graphopt_loops; loop->arithmetic; ++loop) {
    if (strcmp(loop->arithmetic, arithmetic) != 0) continue;
    uint64_t least = UINT64_MAX;
    for (int i = 0; i < TRIALS; ++i) {
      uint64_t begun = now();
      loop->run(operands, operands, sums, TURNS);
      uint64_t taken = now() - begun;
      if (taken < least) least = taken;
    }
    return (double)loop->operations * TURNS / ((double)least * 1e-9);
  }
  return 0;
}

void graphopt_close(graphopt_model* model) {
  if (!model) return;
  if (model->threads > 1 && model->born == forks) {
    atomic_store(&model->leave, 1);
    call_workers(model);
    for (int i = 0; i < model->threads - 1; ++i) pthread_join(model->workers[i].thread, NULL);
  }
  if (model->mapped) munmap((void*)(model->weights - PAGE), model->mapped);
  free(model->workers);
  free(model->workspace);
  free(model);
}
