/* A libcuda.so.1 without a GPU: it notes what it is asked, and fails where it is told to. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST 64
static int capture_mode; /* 0 is global, as every thread begins */
static uint64_t noted[MOST];
static int fail_status = 0;
static char fail_at[64] = "";

static int status_of(const char* name) { return strcmp(name, fail_at) == 0 ? fail_status : 0; }
void fake_fail(const char* name, int status) {
  strncpy(fail_at, name, sizeof fail_at - 1);
  fail_status = status;
}
const uint64_t* fake_noted(void) { return noted; }

int cuLibraryLoadData(void** library, const void* code, void* a, void* b, unsigned c, void* d, void* e, unsigned f) {
  (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
  noted[0] += 1;
  noted[1] = ((const unsigned char*)code)[0];
  noted[9] = (uint64_t)capture_mode;
  *library = (void*)0x1000;
  return status_of("cuLibraryLoadData");
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  noted[2] = (uint64_t)library;
  noted[3] = strlen(name);
  *kernel = (void*)0x2000;
  return status_of("cuLibraryGetKernel");
}
int cuLibraryUnload(void* library) {
  noted[30] = (uint64_t)library;
  return 0;
}
int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  (void)kernel;
  noted[4] = (uint64_t)attribute;
  noted[5] = (uint64_t)value;
  noted[6] = (uint64_t)device;
  return status_of("cuKernelSetAttribute");
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  const int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return 0;
}
int cuKernelGetFunction(void** function, void* kernel) {
  *function = (void*)((uint64_t)kernel + 1);
  return status_of("cuKernelGetFunction");
}
int cuFuncLoad(void* function) {
  noted[8] = (uint64_t)function;
  return status_of("cuFuncLoad");
}
int cuDriverGetVersion(int* version) {
  *version = 12040;
  return 0;
}
int cuDeviceGet(int* device, int number) {
  *device = 100 + number;
  return status_of("cuDeviceGet");
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = (void*)(uint64_t)(0x4000 + device);
  return status_of("cuDevicePrimaryCtxRetain");
}
int cuCtxSetCurrent(void* context) {
  noted[7] = (uint64_t)context;
  noted[48] += 1;
  if (fail_status == 201 || fail_status == 400) fail_status = 0;
  return status_of("cuCtxSetCurrent");
}

/* As cuda.h lays them out. */
typedef struct {
  int id;
  char pad[4];
  union {
    char pad[64];
    unsigned cluster[3];
    int early;
  } value;
} Attribute;
typedef struct {
  unsigned gx, gy, gz, bx, by, bz, shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
} Config;
static void note_attributes(const Config* config) {
  noted[40] = config->count;
  noted[41] = noted[42] = noted[43] = noted[44] = 0;
  for (unsigned i = 0; i < config->count; ++i) {
    const Attribute* attribute = config->attributes + i;
    if (attribute->id == 4) {
      for (int j = 0; j < 3; ++j) noted[41 + j] = attribute->value.cluster[j];
    } else if (attribute->id == 6) {
      noted[44] = (uint64_t)attribute->value.early;
    } else {
      abort();
    }
  }
}
int cuLaunchKernelEx(const Config* config, void* kernel, void** arguments, void** extra) {
  const uint64_t all[] = {(uint64_t)kernel, config->gx, config->gy,     config->gz,               config->bx,
                          config->by,       config->bz, config->shared, (uint64_t)config->stream, (uint64_t)extra};
  memcpy(noted + 10, all, sizeof all);
  note_attributes(config);
  for (int i = 0; i < 3; ++i) noted[20 + i] = *(uint64_t*)arguments[i];
  return status_of("cuLaunchKernelEx");
}
int cuOccupancyMaxActiveClusters(int* count, void* kernel, const Config* config) {
  noted[45] = (uint64_t)kernel;
  noted[46] = config->bx;
  noted[47] = config->shared;
  note_attributes(config);
  *count = 132 / (int)(config->gx * config->gy);
  return status_of("cuOccupancyMaxActiveClusters");
}
int cuGetErrorString(int status, const char** text) {
  *text = status == 2 ? "out of memory" : "invalid argument";
  return 0;
}
