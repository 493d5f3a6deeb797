// Stands in for CUDA's driver where there is no GPU: it accepts every launch, does nothing, and keeps what it was
// given.
//
// benchmarks/triton_host.py puts it in the place of libcuda.so.1. The functions' arguments are those of cuda.h, of
// which only the ones that are written to are named.
#include <cstring>

namespace {
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76, kMaxThreads = 0;  // of cuda.h
int zero(int* value) { return *value = 0; }
int handle(void** value) {
  *value = reinterpret_cast<void*>(8);
  return 0;
}
}  // namespace

extern "C" {

long fastguide_launches = 0;
void* fastguide_parameters[8] = {};  // of the last launch: the first of them are the pointers of its tensors

int cuLaunchKernelEx(const void*, void*, void** parameters, void**) {
  ++fastguide_launches;
  for (int k = 0; k < 8; ++k) fastguide_parameters[k] = *static_cast<void**>(parameters[k]);
  return 0;
}

int cuPointerGetAttribute(void* value, int, unsigned long long pointer) {
  std::memcpy(value, &pointer, sizeof pointer);
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == kCapabilityMajor   ? 9
           : attribute == kCapabilityMinor ? 0
                                           : 227 << 10;  // of an H100: its bytes of shared memory
  return 0;
}

int cuFuncGetAttribute(int* value, int attribute, void*) {
  *value = attribute == kMaxThreads ? 1024 : 0;
  return 0;
}

int cuGetErrorString(int, const char** text) {
  *text = "a stand-in's error";
  return 0;
}

int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}

int cuDeviceGet(int* device, int) { return zero(device); }
int cuCtxGetDevice(int* device) { return zero(device); }
int cuStreamIsCapturing(void*, int* status) { return zero(status); }
int cuDevicePrimaryCtxRetain(void** context, int) { return handle(context); }
int cuCtxGetCurrent(void** context) { return handle(context); }
int cuModuleLoadData(void** module, const void*) { return handle(module); }
int cuModuleGetFunction(void** function, void*, const char*) { return handle(function); }

#define FASTGUIDE_ACCEPT(name) \
  int name() { return 0; }
FASTGUIDE_ACCEPT(cuInit)
FASTGUIDE_ACCEPT(cuCtxSetCurrent)
FASTGUIDE_ACCEPT(cuCtxGetLimit)
FASTGUIDE_ACCEPT(cuCtxSetLimit)
FASTGUIDE_ACCEPT(cuFuncSetAttribute)
FASTGUIDE_ACCEPT(cuFuncSetCacheConfig)
FASTGUIDE_ACCEPT(cuModuleUnload)
FASTGUIDE_ACCEPT(cuOccupancyMaxActiveClusters)
FASTGUIDE_ACCEPT(cuTensorMapEncodeTiled)
FASTGUIDE_ACCEPT(cuTensorMapEncodeIm2col)

}  // extern "C"
