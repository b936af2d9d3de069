#include <atomic>
#include <mutex>
#include <thread>

#include "device/emulator/card.h"
#include "device/emulator/global_memory.h"
#include "device/emulator/report.h"

namespace almostgpt::emulator {
namespace {

std::mutex one_session;
std::atomic<std::thread::id> owner;
const CardLimits* played = nullptr;

}  // namespace

const CardLimits* session_limits() { return played; }

NoOtherSession::NoOtherSession() : locked_(owner.load() != std::this_thread::get_id()) {
  if (locked_) one_session.lock();
}
NoOtherSession::~NoOtherSession() {
  if (locked_) one_session.unlock();
}

Session::Session(int major, int minor) {
  card_of(major, minor);  // throws for a card that is not known
  if (owner.load() == std::this_thread::get_id()) fail("session", {}, "this thread has a session open", "end it first");
  one_session.lock();
  owner = std::this_thread::get_id();
  played = limits_of(major, minor);
}

Session::~Session() {
  buffers().clear();
  played = nullptr;
  owner = std::thread::id();
  one_session.unlock();
}

void Session::buffer(const char* name, const void* address, size_t bytes, Use use) {
  add_buffer(name, address, bytes, use);
}

}  // namespace almostgpt::emulator
