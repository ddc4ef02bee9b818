/* A compiled model in C.
 *
 *   graphopt_model* model = graphopt_open(NULL, 1, message, sizeof message);
 *   graphopt_run(model, inputs, outputs);      // arrays of pointers, in the order of graphopt_describe()
 *   graphopt_close(model);
 *
 * The library that exports these functions is the model: link against it, or load it with dlopen, as a program with
 * several models does. It needs the C library and threads, nothing else. Values lie in row-major order; memory for
 * inputs and outputs is the caller's and need not be aligned beyond its elements.
 *
 * All functions may be called from any thread. An open model runs once at a time: others who call it wait. Models that
 * were opened on their own run side by side, those of the same library too. After a fork the child may go on with what
 * its parent had opened. Close all models of a library before dlclose, and none that is running.
 */
#ifndef GRAPHOPT_H_
#define GRAPHOPT_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GRAPHOPT_EXPORT __attribute__((visibility("default")))

/* An input or output: its name, NumPy's name of its element type, its shape, and how many bytes it has. */
typedef struct {
  const char* name;
  const char* dtype;
  int32_t rank;
  const int64_t* shape;
  uint64_t bytes;
} graphopt_tensor;

/* A step of a run: the kernel that is called, the nodes of the model that it computes, whether it multiplies and adds
 * floats ("float") or bytes ("integer") or does something else (""), and how many operations it takes. */
typedef struct {
  const char* kernel;
  const char* sites;
  const char* arithmetic;
  uint64_t operations;
} graphopt_step;

typedef struct {
  int32_t format; /* of these structures: GRAPHOPT_FORMAT */
  const char* target;
  const char* features; /* that the CPU must have, as Linux names them, with blanks between */
  int32_t input_count;
  int32_t output_count;
  int32_t step_count;
  const graphopt_tensor* inputs;
  const graphopt_tensor* outputs;
  const graphopt_step* steps;
  uint64_t weight_bytes;
  const char* weight_digest;  /* of the file model.weights */
  uint64_t workspace_bytes;   /* that a run needs */
  uint64_t thread_bytes;      /* that it needs besides for each thread */
} graphopt_description;

#define GRAPHOPT_FORMAT 1

typedef struct graphopt_model graphopt_model;

/* What the model takes and gives. */
GRAPHOPT_EXPORT const graphopt_description* graphopt_describe(void);

/* Makes the model ready to run on a number of threads, 256 at most, the caller's own among them.
 *
 * weights: path of the file model.weights, which is mapped and not read; NULL where weights are in the library.
 * message: room for a line that says why, if the result is NULL: the CPU lacks an instruction, a file is not there.
 */
GRAPHOPT_EXPORT graphopt_model* graphopt_open(const char* weights, int threads, char* message, size_t room);

/* Runs the model once. */
GRAPHOPT_EXPORT void graphopt_run(graphopt_model* model, const void* const* inputs, void* const* outputs);

/* Runs the model on as many batches as `count` says, one after the other: the first axis of each input and output is
 * then `count` times as long as graphopt_describe() says. Returns 1; or 0, and runs nothing, where the compiler has not
 * proven that samples of this model stay apart, or where they do not lie along the first axis of all inputs and outputs; a count of 0 asks.
 */
GRAPHOPT_EXPORT int graphopt_run_batch(
    graphopt_model* model, const void* const* inputs, void* const* outputs, uint64_t count);

/* Runs the model once and adds the nanoseconds of each step to times[step_count]. */
GRAPHOPT_EXPORT void graphopt_profile(
    graphopt_model* model, const void* const* inputs, void* const* outputs, uint64_t* times);

/* Operations a second that one core of this machine can do in its registers, measured; 0 for arithmetic that the
 * library has not. */
GRAPHOPT_EXPORT double graphopt_peak(const char* arithmetic);

GRAPHOPT_EXPORT void graphopt_close(graphopt_model* model);

#ifdef __cplusplus
}
#endif

#endif /* GRAPHOPT_H_ */
