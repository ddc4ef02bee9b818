/* Drives the runtime hard around a network of four steps written here; test_runtime.py builds it with sanitizers.
 *
 *   team CASE THREADS      returns 0, or says what went wrong
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "compiled.h"

enum { COUNT = 60, STEPS = 4 };

/* ---- the network: y[i] = 2 * (x[i] + 1) + weights[i], by way of two reversals */

static const int64_t shape[] = {COUNT};
static const graphopt_tensor x = {"x", "int32", 1, shape, 4 * COUNT}, y = {"y", "int32", 1, shape, 4 * COUNT};
static const graphopt_step steps[STEPS];
static const int32_t weights[COUNT] = {7, 5, 3};
const graphopt_description graphopt_this = {
    GRAPHOPT_FORMAT, "test", "", 1, 1, STEPS, &x, &y, steps, sizeof weights, "", 8 * COUNT, 0};
const uint8_t* const graphopt_embedded_weights = (const uint8_t*)weights;
const int graphopt_samples_apart = 1;
const graphopt_loop graphopt_loops[] = {{0, 0, 0}};

typedef void part_of(void** memory, int from, int to);

static void step0(void** m, int from, int to) {
  const int32_t* input = m[0];
  int32_t* a = m[3];
  for (int i = from; i < to; ++i) a[i] = input[i] + 1;
}
static void step1(void** m, int from, int to) {
  int32_t *a = m[3], *b = a + COUNT;
  for (int i = from; i < to; ++i) b[i] = a[COUNT - 1 - i];
}
static void step2(void** m, int from, int to) {
  int32_t *a = m[3], *b = a + COUNT;
  for (int i = from; i < to; ++i) a[i] = 2 * b[i];
}
static void step3(void** m, int from, int to) {
  int32_t *output = m[1], *a = m[3];
  const int32_t* added = m[2];
  for (int i = from; i < to; ++i) output[i] = a[COUNT - 1 - i] + added[i];
}

static void shared(part_of* kernel, int step, void** memory, void* self, int task, int tasks) {
  for (int i = 0; i < tasks; ++i) {
    int part = (task + i) % tasks;
    if (!graphopt_take(self, step, part)) continue;
    kernel(memory, part * COUNT / tasks, (part + 1) * COUNT / tasks);
    graphopt_done(self, step);
  }
  graphopt_behind(self, step, tasks);
}

/* As the entry function of a compiled model does: large steps in parts, small ones in a row by one thread. */
void graphopt_enter(
    _Atomic(const void*)* inputs, _Atomic(void*)* outputs, const void* constants, void* workspace, void* self,
    int32_t task, int32_t tasks) {
  void* memory[] = {(void*)inputs[0], outputs[0], (void*)constants, workspace};
  shared(step0, 0, memory, self, task, tasks);
  if (graphopt_take(self, 2, 0)) {
    step1(memory, 0, COUNT);
    graphopt_between(self, 1);
    step2(memory, 0, COUNT);
    graphopt_done(self, 2);
  }
  graphopt_behind(self, 2, 1);
  shared(step3, 3, memory, self, task, tasks);
}

/* ---- what can go wrong */

static void fail(const char* what) {
  fprintf(stderr, "%s\n", what);
  fflush(stderr);
  _exit(1);
}

static graphopt_model* opened(int threads) {
  char message[256] = "";
  graphopt_model* model = graphopt_open(NULL, threads, message, sizeof message);
  if (!model) fail(message);
  return model;
}

/* One run; what the caller hands over is gone right after, whoever comes late. */
static void run(graphopt_model* model, int seed) {
  const void** inputs = malloc(sizeof *inputs);
  void** outputs = malloc(sizeof *outputs);
  int32_t *given = malloc(4 * COUNT), *made = malloc(4 * COUNT);
  for (int i = 0; i < COUNT; ++i) given[i] = seed * 1000 + i;
  inputs[0] = given, outputs[0] = made;
  graphopt_run(model, inputs, outputs);
  free(inputs);
  free(outputs);
  for (int i = 0; i < COUNT; ++i)
    if (made[i] != 2 * (given[i] + 1) + weights[i]) fail("a wrong result");
  free(given);
  free(made);
}

static void many_runs(int threads) {
  graphopt_model* model = opened(threads);
  for (int i = 0; i < 3000; ++i) {
    run(model, i);
    if (i % 500 == 0) usleep(3000); /* so that workers fall asleep */
  }
  graphopt_close(model);
}

static void open_and_close(int threads) {
  for (int i = 0; i < 150; ++i) {
    graphopt_model* model = opened(threads);
    for (int k = 0; k < i % 4; ++k) run(model, k);
    graphopt_close(model);
  }
  graphopt_close(NULL);
}

static void* some_runs(void* model) {
  for (int i = 0; i < 500; ++i) run(model, i);
  return NULL;
}

static void two_callers(int threads) {
  graphopt_model* model = opened(threads);
  pthread_t other;
  pthread_create(&other, NULL, some_runs, model);
  some_runs(model);
  pthread_join(other, NULL);
  graphopt_close(model);
}

static void two_models(int threads) {
  graphopt_model *one = opened(threads), *two = opened(threads);
  pthread_t other;
  pthread_create(&other, NULL, some_runs, two);
  some_runs(one);
  pthread_join(other, NULL);
  graphopt_close(one);
  graphopt_close(two);
}

/* Children go on with a model of their parent, which another thread runs at that moment. */
static void forks(int threads) {
  graphopt_model *model = opened(threads), *unused = opened(threads);
  pthread_t other;
  pthread_create(&other, NULL, some_runs, model);
  for (int i = 0; i < 10; ++i) {
    pid_t child = fork();
    if (child == 0) {
      alarm(60);
      run(model, 1);
      run(model, 2);
      graphopt_close(model);
      graphopt_close(unused);
      _exit(0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    if (status) fail("a child failed");
    run(model, 3);
  }
  pthread_join(other, NULL);
  graphopt_close(model);
  graphopt_close(unused);
}

static void profiles(int threads) {
  graphopt_model* model = opened(threads);
  int32_t given[COUNT] = {0}, made[COUNT];
  const void* inputs[] = {given};
  void* outputs[] = {made};
  for (int i = 0; i < 1000; ++i) {
    uint64_t times[STEPS] = {0};
    graphopt_profile(model, inputs, outputs, times);
    for (int k = 0; k < STEPS; ++k)
      if (times[k] > 60000000000u) fail("a step that took no time, or years");
    run(model, i);
  }
  graphopt_close(model);
}

/* The system gives no more threads from the nth on. */
static int left = -1;
int __real_pthread_create(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
int __wrap_pthread_create(pthread_t* t, const pthread_attr_t* a, void* (*f)(void*), void* p) {
  if (left == 0) return 11; /* EAGAIN */
  if (left > 0) --left;
  return __real_pthread_create(t, a, f, p);
}

static void no_threads(int threads) {
  for (int i = 0; i < threads - 1; ++i) {
    char message[256] = "";
    left = i;
    if (graphopt_open(NULL, threads, message, sizeof message)) fail("opened without its threads");
    if (strcmp(message, "cannot start threads") != 0) fail(message);
  }
}

static void forks_without_threads(int threads) {
  graphopt_model* model = opened(threads);
  pid_t child = fork();
  if (child == 0) {
    alarm(60);
    left = threads > 2;
    for (int i = 0; i < 100; ++i) run(model, i); /* with the threads that there are */
    graphopt_close(model);
    _exit(0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  if (status) fail("a child without threads failed");
  graphopt_close(model);
}

int main(int count, char** words) {
  static const struct {
    const char* name;
    void (*run)(int);
  } cases[] = {{"many_runs", many_runs},   {"open_and_close", open_and_close}, {"two_callers", two_callers},
               {"two_models", two_models}, {"forks", forks},                   {"profiles", profiles},
               {"no_threads", no_threads}, {"forks_without_threads", forks_without_threads}};
  for (size_t i = 0; count == 3 && i < sizeof cases / sizeof *cases; ++i) {
    if (strcmp(cases[i].name, words[1]) != 0) continue;
    cases[i].run(atoi(words[2]));
    return 0;
  }
  fprintf(stderr, "no such case\n");
  return 2;
}
