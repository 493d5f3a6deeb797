// Runs, or records, the kernel of a step's backward pass: part of device_code.cpp.

// A dictionary with the names of Gradients in fastguide/step/backward.py, and `slots`.
struct BackwardCall {
  BackwardArguments b{};
  std::vector<Output> predictions;
};

static BackwardCall gradients_of(const py::dict& d) {
  BackwardCall call;
  BackwardArguments& b = call.b;
  b.grad_out = tensor<Input>(d, "grad_out");
  b.grad_original = tensor<Input>(d, "grad_original");
  b.grad_left = tensor<Input>(d, "grad_left");
  b.grad_sample = tensor<Output>(d, "grad_sample");
  b.grad_gradient = tensor<Output>(d, "grad_gradient");
  b.grad_variance = tensor<Output>(d, "grad_variance");
  b.grad_noise = tensor<Output>(d, "grad_noise");
  b.grad_anchor = tensor<Output>(d, "grad_anchor");
  b.grad_history = tensor<Output>(d, "grad_history");
  b.grad_weights = pointer<double>(d, "grad_weights");
  b.slots = number<int>(d, "slots", 0);
  for (const py::handle& value : d["grad_predictions"]) call.predictions.push_back(tensor<Output>(value));
  b.grad_predictions = call.predictions.empty() ? nullptr : call.predictions.data();
  return call;
}

static void allow_gradients(const Arguments& arguments, const BackwardCall& call) {
  allow_all(arguments);
  const int64_t batch = arguments.a.batch, size = arguments.a.elements_per_sample, several = batch * call.b.slots;
  for (const Input* input : {&call.b.grad_out, &call.b.grad_original}) allow(*input, batch, size);
  for (const Output* output :
       {&call.b.grad_sample, &call.b.grad_gradient, &call.b.grad_variance, &call.b.grad_noise, &call.b.grad_anchor}) {
    allow(*output, batch, size);
  }
  for (const Output& output : call.predictions) allow(output, batch, size);
  allow(call.b.grad_left, several, size);
  allow(call.b.grad_history, several, size);
}

// Returns the number of accesses of 16 bytes.
static uint64_t launch_backward_of(const py::dict& d, const py::dict& gradients, uint64_t order_seed) {
  const Arguments arguments = arguments_of(d);
  const BackwardCall call = gradients_of(gradients);
  allow_gradients(arguments, call);
  order.seed(order_seed);
  wanted_blocks.reset();
  const char* error = cuda::launch_step_backward(arguments.a, call.b, 0, nullptr);
  if (error != nullptr) throw std::runtime_error(error);
  return accesses;
}

static py::list record_backward(const py::dict& d, const py::dict& gradients) {
  const Arguments arguments = arguments_of(d);
  const BackwardCall call = gradients_of(gradients);
  return recorded_by([&] { return cuda::launch_step_backward(arguments.a, call.b, 0, nullptr); });
}
