/* A CUDA runtime whose device memory is malloc'ed: it records every call, captures streams into graphs, and fails where a
   test wants it to. What a kernel does is a callback of the test (standin_enqueue). Copies move bytes when they run. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LOG_BYTES = 1 << 16, MAX_STEPS = 64 };

typedef void (*kernel)(void *);
struct step {
    void *to;
    const void *from;
    size_t bytes;
    kernel run; /* NULL: a copy */
    void *argument;
};
struct graph {
    int count;
    struct step steps[MAX_STEPS];
};

static char log_text[LOG_BYTES];
static char failing[64];
static int failing_code;
static struct graph *capturing;
static long live;

static int called(const char *name) {
    if (strlen(log_text) + strlen(name) + 2 < LOG_BYTES) {
        strcat(log_text, name);
        strcat(log_text, " ");
    }
    return strcmp(name, failing) ? 0 : failing_code;
}
#define CALLED(name)               \
    do {                           \
        int code = called(name);   \
        if (code) return code;     \
    } while (0)

static void run(const struct step *step) {
    if (step->run)
        step->run(step->argument);
    else
        memcpy(step->to, step->from, step->bytes);
}

static int enqueue(struct step step) {
    if (!capturing)
        run(&step);
    else if (capturing->count == MAX_STEPS)
        return 2;
    else
        capturing->steps[capturing->count++] = step;
    return 0;
}

/* For the test. */
const char *standin_log(void) { return log_text; }
void standin_clear(void) { log_text[0] = 0; }
long standin_live(void) { return live; }
void standin_fail(const char *name, int code) {
    snprintf(failing, sizeof failing, "%s", name);
    failing_code = code;
}
int standin_enqueue(kernel run_it, void *argument) {
    struct step step = {0, 0, 0, run_it, argument};
    return enqueue(step);
}

/* The runtime. */
const char *cudaGetErrorString(int code) { return code == 2 ? "out of memory" : code == 35 ? "no driver" : "some error"; }
static int allocate(void **out, size_t bytes) {
    *out = malloc(bytes ? bytes : 1);
    memset(*out, 0xEE, bytes); /* not zero: whoever forgets to copy shall see it */
    live++;
    return 0;
}
static int release(void *pointer) {
    free(pointer);
    live--;
    return 0;
}
int cudaMalloc(void **out, size_t bytes) { CALLED("cudaMalloc"); return allocate(out, bytes); }
int cudaFree(void *pointer) { CALLED("cudaFree"); return release(pointer); }
int cudaHostAlloc(void **out, size_t bytes, unsigned flags) { (void)flags; CALLED("cudaHostAlloc"); return allocate(out, bytes); }
int cudaFreeHost(void *pointer) { CALLED("cudaFreeHost"); return release(pointer); }
int cudaStreamCreate(void **out) { CALLED("cudaStreamCreate"); return allocate(out, 1); }
int cudaStreamDestroy(void *stream) { CALLED("cudaStreamDestroy"); return release(stream); }
int cudaStreamSynchronize(void *stream) { (void)stream; CALLED("cudaStreamSynchronize"); return capturing ? 900 : 0; }
/* An event remembers how many calls came before it: half a microsecond each. */
int cudaEventCreate(void **out) { CALLED("cudaEventCreate"); return allocate(out, sizeof(long)); }
int cudaEventDestroy(void *event) { CALLED("cudaEventDestroy"); return release(event); }
int cudaEventRecord(void *event, void *stream) {
    (void)stream;
    CALLED("cudaEventRecord");
    *(long *)event = (long)strlen(log_text);
    return capturing ? 900 : 0;
}
int cudaEventElapsedTime(float *out, void *begin, void *end) {
    CALLED("cudaEventElapsedTime");
    *out = (float)(*(long *)end - *(long *)begin) / 2000.0f;
    return 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    struct step step = {to, from, bytes, 0, 0};
    (void)stream;
    CALLED(kind == 1 ? "cudaMemcpyAsync:to_device" : "cudaMemcpyAsync:to_host");
    return enqueue(step);
}
int cudaStreamBeginCapture(void *stream, int mode) {
    (void)stream;
    (void)mode;
    CALLED("cudaStreamBeginCapture");
    capturing = calloc(1, sizeof *capturing);
    live++;
    return 0;
}
int cudaStreamEndCapture(void *stream, void **graph) {
    (void)stream;
    *graph = capturing;
    capturing = 0;
    CALLED("cudaStreamEndCapture");
    return 0;
}
int cudaGraphInstantiateWithFlags(void **out, void *graph, unsigned long long flags) {
    (void)flags;
    CALLED("cudaGraphInstantiateWithFlags");
    *out = malloc(sizeof(struct graph));
    memcpy(*out, graph, sizeof(struct graph));
    live++;
    return 0;
}
int cudaGraphLaunch(void *executable, void *stream) {
    struct graph *graph = executable;
    (void)stream;
    CALLED("cudaGraphLaunch");
    for (int i = 0; i < graph->count; i++) run(&graph->steps[i]);
    return 0;
}
int cudaGraphDestroy(void *graph) { CALLED("cudaGraphDestroy"); return release(graph); }
int cudaGraphExecDestroy(void *graph) { CALLED("cudaGraphExecDestroy"); return release(graph); }
int cudaDeviceGetAttribute(int *out, int attribute, int device) {
    (void)device;
    CALLED("cudaDeviceGetAttribute");
    *out = attribute == 75 ? 8 : 7;
    return 0;
}
int cudaGetDeviceProperties(char *properties, int device) {
    (void)device;
    CALLED("cudaGetDeviceProperties");
    strcpy(properties, "Orin");
    return 0;
}
int cudaSetDeviceFlags(unsigned flags) { (void)flags; CALLED("cudaSetDeviceFlags"); return 0; }
int cudaRuntimeGetVersion(int *out) {
    CALLED("cudaRuntimeGetVersion");
    *out = 12060;
    return 0;
}
