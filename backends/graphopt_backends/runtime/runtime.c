/* What runs a compiled model: its memory, and a team of threads that walks through its steps together.
 *
 * Every thread executes the same entry function. A step that is worth it has as many parts as there are threads; each
 * thread takes its own part, then those of threads that have not come yet, and goes on when all parts are done. So a
 * thread that the system stopped holds nobody up unless it is in the middle of a part, and may come late or never.
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

#include "compiled.h"
#include "cpu.h"
#include "graphopt.h"

enum { PAGE = 4096, HUGE_PAGE = 2 << 20, SPINS = 20000, PATIENCE = 2000, MOST_THREADS = 256 };

typedef struct {
  graphopt_model* model;
  pthread_t thread;
  atomic_int number; /* the system's, 0 until it has started */
  int task;          /* 0: the caller's own */
  int core;          /* that it is bound to; -1: none */
  unsigned run;      /* that it works on */
} worker;

struct graphopt_model {
  graphopt_model* next; /* of all open ones */
  const uint8_t* weights;
  size_t mapped; /* bytes to unmap; 0: the weights are in the library */
  void* workspace;
  int threads;
  int started; /* workers that run in this process */
  worker* workers;
  int home; /* core that no worker is bound to */
  /* Runs are numbered; numbers wrap, and are compared by their difference. */
  atomic_uint* taken;    /* by step and part: the last run that somebody took it for */
  atomic_uint* finished; /* by step: parts that were done, in all runs */
  pthread_mutex_t running;
  /* the run: */
  int timed;
  _Atomic(uint64_t)* ends; /* by step: when its last part was done, if it is timed */
  /* A thread that comes late still reads the pointers, of an old run or of a new one, and uses none. */
  _Atomic(const void*)* inputs;
  _Atomic(void*)* outputs;
  atomic_int sleeping;
  atomic_int leave;
  pthread_mutex_t mutex; /* of those that sleep */
  pthread_cond_t wake;
  _Alignas(64) atomic_uint runs; /* counts up when there is work */
};

const graphopt_description* graphopt_describe(void) { return &graphopt_this; }

static uint64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int32_t graphopt_take(void* state, int32_t step, int32_t part) {
  worker* self = state;
  if (self->model->threads == 1) return 1;
  atomic_uint* last = &self->model->taken[step * self->model->threads + part];
  unsigned run = atomic_load_explicit(last, memory_order_relaxed);
  return (int)(run - self->run) < 0 &&
         atomic_compare_exchange_strong_explicit(last, &run, self->run, memory_order_acq_rel, memory_order_relaxed);
}

static void stop_the_clock(graphopt_model* model, int32_t step) {
  uint64_t time = now(), known = atomic_load(&model->ends[step]);
  while (known < time && !atomic_compare_exchange_weak(&model->ends[step], &known, time)) continue;
}

void graphopt_between(void* state, int32_t step) {
  worker* self = state;
  if (self->model->timed) stop_the_clock(self->model, step);
}

void graphopt_done(void* state, int32_t step) {
  graphopt_model* model = ((worker*)state)->model;
  if (model->timed) stop_the_clock(model, step);
  if (model->threads > 1) atomic_fetch_add_explicit(&model->finished[step], 1, memory_order_acq_rel);
}

void graphopt_behind(void* state, int32_t step, int32_t parts) {
  worker* self = state;
  graphopt_model* model = self->model;
  if (model->threads == 1) return;
  unsigned wanted = self->run * (unsigned)parts;
  for (int spins = 0; (int)(atomic_load_explicit(&model->finished[step], memory_order_acquire) - wanted) < 0; ++spins) {
    if (spins < PATIENCE)
      cpu_relax();
    else
      sched_yield(); /* there are fewer cores than threads */
  }
}

static void enter(worker* self) {
  graphopt_model* model = self->model;
  graphopt_enter(model->inputs, model->outputs, model->weights, model->workspace, self, self->task, model->threads);
}

static void* work(void* argument) {
  worker* self = argument;
  graphopt_model* model = self->model;
  unsigned done = self->run;
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
    done = self->run = atomic_load(&model->runs);
    if (atomic_load(&model->leave)) return NULL;
    enter(self);
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

/* Starts the workers, each on a core of its own where there are enough; 0 if one of them cannot be started. */
static int start(graphopt_model* model) {
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
  for (int i = 1; i < model->threads; ++i) {
    worker* self = &model->workers[i];
    self->task = i;
    self->core = -1;
    self->run = atomic_load(&model->runs);
    atomic_store(&self->number, 0);
    if (pthread_create(&self->thread, NULL, work, self)) return 0;
    model->started = i;
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
  for (int i = 1; i <= model->started; ++i) {
    if (model->workers[i].core == core) {
      bind_worker(&model->workers[i], model->home);
      model->home = core;
      return;
    }
  }
}

static void stop(graphopt_model* model) {
  atomic_store(&model->leave, 1);
  call_workers(model);
  for (int i = 1; i <= model->started; ++i) pthread_join(model->workers[i].thread, NULL);
}

/* No run is going on, and no worker there. */
static int rest(graphopt_model* model) {
  size_t steps = (size_t)graphopt_this.step_count + 1;
  model->started = 0;
  atomic_store(&model->runs, 0);
  atomic_store(&model->sleeping, 0);
  memset(model->taken, 0, steps * (size_t)model->threads * sizeof *model->taken);
  memset(model->finished, 0, steps * sizeof *model->finished);
  return !pthread_mutex_init(&model->running, NULL) && !pthread_mutex_init(&model->mutex, NULL) &&
         !pthread_cond_init(&model->wake, NULL);
}

/* Open models: in a child process none of their threads is there, and nobody ends what they were doing. */
static pthread_mutex_t list = PTHREAD_MUTEX_INITIALIZER;
static graphopt_model* open_models;

static void before_fork(void) { pthread_mutex_lock(&list); }
static void in_parent(void) { pthread_mutex_unlock(&list); }
static void in_child(void) {
  for (graphopt_model* model = open_models; model; model = model->next) rest(model);
  pthread_mutex_unlock(&list);
}
static void watch_forks(void) { pthread_atfork(before_fork, in_parent, in_child); }

static void enlist(graphopt_model* model) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, watch_forks);
  pthread_mutex_lock(&list);
  model->next = open_models;
  open_models = model;
  pthread_mutex_unlock(&list);
}

static void strike(graphopt_model* model) {
  pthread_mutex_lock(&list);
  graphopt_model** at = &open_models;
  while (*at != model) at = &(*at)->next;
  *at = model->next;
  pthread_mutex_unlock(&list);
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

static void release(graphopt_model* model) {
  if (model->mapped) munmap((void*)(model->weights - PAGE), model->mapped);
  free(model->inputs);
  free(model->outputs);
  free(model->ends);
  free(model->taken);
  free(model->finished);
  free(model->workers);
  free(model->workspace);
  free(model);
}

/* Memory of a model; returns what went wrong, or NULL. */
static const char* furnish(graphopt_model* model) {
  size_t threads = (size_t)model->threads, steps = (size_t)graphopt_this.step_count + 1;
  model->workspace = page_aligned((size_t)(graphopt_this.workspace_bytes + threads * graphopt_this.thread_bytes));
  model->workers = calloc(threads, sizeof *model->workers);
  model->taken = calloc(steps * threads, sizeof *model->taken);
  model->finished = calloc(steps, sizeof *model->finished);
  model->ends = calloc(steps, sizeof *model->ends);
  model->inputs = calloc((size_t)graphopt_this.input_count + 1, sizeof *model->inputs);
  model->outputs = calloc((size_t)graphopt_this.output_count + 1, sizeof *model->outputs);
  if (!model->workspace || !model->workers || !model->taken || !model->finished || !model->ends || !model->inputs ||
      !model->outputs)
    return "out of memory";
  for (size_t i = 0; i < threads; ++i) model->workers[i].model = model;
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
  if (!fault) fault = furnish(model);
  if (!fault && !cpu_prepare(graphopt_this.features)) fault = "the system refuses the CPU's matrix registers";
  if (!fault && (!rest(model) || !start(model))) {
    stop(model);
    fault = "cannot start threads";
  }
  if (fault) {
    snprintf(message, room, "%s", fault);
    release(model);
    return NULL;
  }
  enlist(model);
  return model;
}

static void run(graphopt_model* model, const void* const* inputs, void* const* outputs) {
  for (int i = 0; i < graphopt_this.input_count; ++i) atomic_store_explicit(&model->inputs[i], inputs[i], memory_order_relaxed);
  for (int i = 0; i < graphopt_this.output_count; ++i) atomic_store_explicit(&model->outputs[i], outputs[i], memory_order_relaxed);
  if (model->threads > 1) {
    if (!model->started) start(model); /* in a child process; without workers the caller does it all */
    make_room(model);
    call_workers(model);
    model->workers[0].run = atomic_load(&model->runs);
  }
  enter(&model->workers[0]);
}

void graphopt_run(graphopt_model* model, const void* const* inputs, void* const* outputs) {
  pthread_mutex_lock(&model->running);
  run(model, inputs, outputs);
  pthread_mutex_unlock(&model->running);
}

int graphopt_run_batch(graphopt_model* model, const void* const* inputs, void* const* outputs, uint64_t count) {
  if (!graphopt_samples_apart) return 0;
  const graphopt_description* made = &graphopt_this;
  const void* sources[made->input_count + 1];
  void* results[made->output_count + 1];
  pthread_mutex_lock(&model->running);
  for (uint64_t i = 0; i < count; ++i) {
    for (int k = 0; k < made->input_count; ++k) sources[k] = (const uint8_t*)inputs[k] + i * made->inputs[k].bytes;
    for (int k = 0; k < made->output_count; ++k) results[k] = (uint8_t*)outputs[k] + i * made->outputs[k].bytes;
    run(model, sources, results);
  }
  pthread_mutex_unlock(&model->running);
  return 1;
}

void graphopt_profile(graphopt_model* model, const void* const* inputs, void* const* outputs, uint64_t* times) {
  pthread_mutex_lock(&model->running);
  model->timed = 1;
  uint64_t last = now();
  run(model, inputs, outputs);
  model->timed = 0;
  for (int i = 0; i < graphopt_this.step_count; ++i) {
    uint64_t end = atomic_load(&model->ends[i]);
    times[i] += end - last;
    last = end;
  }
  pthread_mutex_unlock(&model->running);
}

double graphopt_peak(const char* arithmetic) {
  enum { BYTES = 4096, TURNS = 20000, TRIALS = 50 };
  static const uint8_t operands[BYTES] __attribute__((aligned(64)));
  uint8_t sums[BYTES] __attribute__((aligned(64)));
  char lacks[64];
  if (!cpu_has(graphopt_this.features, lacks, sizeof lacks) || !cpu_prepare(graphopt_this.features)) return 0;
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
  strike(model);
  stop(model);
  release(model);
}
