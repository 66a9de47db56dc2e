-- SPDX-License-Identifier: Apache-2.0
-- One step on one room: let everything expire that has, do what is asked, write what has changed.
-- KEYS: see store.lua. ARGV[1]: JSON {epoch, confirmed, complete, guarding_since, remembered_since, room_id,
-- operations = [[name, arguments…]…]}. "epoch" names the data set. A guard that does not know yet that it is another one
-- gets {"stale"}. It asks which one it is: the name is "confirmed" then. It counts although the room was worked on under
-- another name since, because a guard with an older name may have been faster.
-- If something has changed since a listing that is said to show the same, nothing is done: the answer is {"changed"}.
-- Else it is JSON {now, listed = {alias → time}, aliases, version, news, results}. "version" is that of the holds, and
-- "news" the number of the last change of who is an occupant. These and times are text: cjson writes 14 digits only.

local request = cjson.decode(ARGV[1])
local time = redis.call('TIME')
now = tonumber(time[1]) + tonumber(time[2]) / 1000000

local function given(value)
  if value == cjson.null then return nil end
  return value
end

-- Other guards may have holds that they have yet to give back: until then no seat is certainly free.
local function seats_to_give(limit)
  limit = given(limit)
  return limit and not request.complete and 0 or limit
end

-- When a listing began. A guard that has not noticed that this clock was set back would name a time to come.
local function begun(since) return math.min(since, now) end

local function text(at) return at and string.format('%.6f', at) or false end

local function arrival(from)
  return {sid = from[1], identity = from[2], user = from[3], joined = given(from[4])}
end

Store.open(Seats.new(request.guarding_since, request.epoch))
if room.before == request.epoch and not request.confirmed then return cjson.encode({'stale'}) end
local was_set_back = room.at ~= nil and room.at > now + CLOCK_STEP
if was_set_back then Seats.shift(now - room.at) end
local has_expired, may_wake = Seats.advance()  -- somebody who waits for a request in flight may find a seat
local is_other_data_set = room.epoch ~= request.epoch
if is_other_data_set then
  Seats.distrust()
  room.before, room.epoch = room.epoch, request.epoch
end

for _, operation in ipairs(request.operations) do
  local name, alias, _, since, version = unpack(operation)
  if name == 'listed_again' and not Seats.is_same(alias, begun(since), tonumber(version)) then
    return cjson.encode({'changed'})
  end
end

local function has_ended() return not Seats.is_occupied() and now - room.vacated >= CALL_ENDED_AFTER end

local Reading = {}

function Reading.owns_seat(user) return Seats.owns_seat(user) end
function Reading.occupants(known) return Seats.occupants_since(known ~= cjson.null and tonumber(known) or nil) end
function Reading.listing_required_since() return text(Seats.listing_required_since()) end
function Reading.is_started() return room.started == true and not has_ended() end
function Reading.nothing() return true end

function Reading.snapshot()
  local present = {}
  for place, hold in ipairs(in_order(Store.all('s'))) do
    present[place] = {hold.alias, hold.sid, hold.identity, hold.user, hold.state}
  end
  return {Seats.is_idle(), Seats.seats_taken(), Seats.awaited(), present}
end

local Writing = {}

-- All that is asked before somebody is refused: when the room has to be listed at least, whether anybody is in the call
-- of whom no user is known, and the changes of who is an occupant since those that the guard knows.
local function full(known)
  return {text(Seats.listing_required_since()), Seats.has_strangers(), Reading.occupants(known)}
end

-- The answer is a list: the refusal, or ''; and for a room that is full what full() tells.
function Writing.take(hold_id, user, limit, alias, exempt, slots, lease, known)
  -- a guard that was alone has issued tokens: they come before somebody new
  if given(limit) and next(room.listed) then Seats.seat_failed_open(seats_to_give(limit)) end
  local refusal = Seats.take(hold_id, user, given(limit), alias, exempt, given(slots), now + lease)
  if refusal == 'seat_pending' then room.waited_until = now + WAIT_LONGEST end
  return {refusal or '', refusal == 'full' and full(known) or false}
end

function Writing.issue(hold_id, user, alias, identity, device, ttl)
  local hold = Seats.issue(hold_id, alias, identity, ttl, device)
  Seats.forget_old(LISTING_KEPT)  -- where nothing is enforced nobody lists
  may_wake = true
  -- its guard could not renew it in time, or the data set was lost: the token is sent all the same
  if not hold then hold = Seats.issue_without_seat(hold_id, user, alias, identity, ttl, device) end
  return {hold.user, hold.state, text(hold.expires)}
end

function Writing.issue_without_seat(hold_id, user, alias, identity, device, ttl)
  local hold = Seats.issue_without_seat(hold_id, user, alias, identity, ttl, device)
  return {hold.user, hold.state, text(hold.expires)}
end

function Writing.release(hold_id)
  may_wake = Seats.release(hold_id) or may_wake
  return true
end

function Writing.renew(hold_ids, lease) return Seats.renew(hold_ids, now + lease) end

-- A hold that its guard gives back. Without a seat it gets one at the next listing, if one is free.
function Writing.restore(hold_id, user, alias, identity, expires, seated, device)
  if expires <= now then return false end
  if seated then Seats.seat_sessions(alias, identity, user) end  -- a listing may have found them before
  if Seats.knows(alias, identity) then return false end
  room.started = true  -- else no token had been issued
  if seated then
    Seats.restore_issued(hold_id, user, alias, identity, expires, device)
  else
    Seats.issue_without_seat(hold_id, user, alias, identity, expires - now, device)
  end
  return true
end

function Writing.recognise(alias, identities, user)
  for _, identity in ipairs(identities) do Seats.rename(alias, identity, user) end
  return true
end

function Writing.exempt(user)
  may_wake = Seats.exempt(user) or may_wake
  return true
end

function Writing.arrive(alias, who, limit)
  Seats.arrive(alias, arrival(who), seats_to_give(limit))
  return true
end

function Writing.leave(alias, sid, identity, left_by, by_choice)
  Seats.leave(alias, sid, identity, left_by, by_choice)
  return true
end

-- The answer is the version of the holds, if a listing that shows the same would tell nothing new.
function Writing.apply_listing(alias, present, limit, since)
  local arrivals = {}
  for place, who in ipairs(present) do
    local arrived = arrival(who)
    arrivals[place] = arrived
    if not room.listed[alias] and (not arrived.joined or arrived.joined <= request.remembered_since) then
      room.started = true  -- the call is older than our memory of it, and somebody must have started it
    end
  end
  local settled = Seats.apply_listing(alias, arrivals, seats_to_give(limit), begun(since))
  Seats.forget_old(LISTING_KEPT)
  return settled and digits(room.version)
end

function Writing.listed_again(alias, limit, since)
  Seats.listed_again(alias, given(limit), begun(since))
  return true
end

function Writing.overflow(limit)
  local over = {}
  if given(limit) and not request.complete then return over end
  for place, hold in ipairs(Seats.overflow(given(limit))) do
    over[place] = {hold.alias, hold.sid, hold.identity, hold.user}
  end
  return over
end

function Writing.seat_everybody()
  Seats.seat_everybody()
  return true
end

function Writing.start()
  room.started = true
  room.vacated = math.max(room.vacated, now)  -- whoever starts it is about to be given a token
  return true
end

local results, writes = {}, was_set_back or has_expired or is_other_data_set  -- else the next step would find the same
for place, operation in ipairs(request.operations) do
  local name = operation[1]
  writes = writes or Writing[name] ~= nil
  results[place] = (Writing[name] or Reading[name])(unpack(operation, 2))
end

if writes then
  if has_ended() then room.started = nil end
  room.at = now
  if room.waited_until and room.waited_until <= now then room.waited_until = nil end
  Seats.close(Seats.is_idle() and IDLE_ROOM or OCCUPIED_ROOM)
  if may_wake and room.waited_until then redis.call('PUBLISH', WAKE_CHANNEL, request.room_id) end
end

local listed = {}
for alias, since in pairs(room.listed) do listed[alias] = text(since) end
return cjson.encode({text(now), listed, Seats.aliases(), digits(room.version), digits(room.news), results})
