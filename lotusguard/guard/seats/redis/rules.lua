-- SPDX-License-Identifier: Apache-2.0
-- The seats of one Matrix room: the rules of lotusguard/rules/room_seats.py, function by function, on the table TABLE that
-- is generated from lotusguard/rules/seats.py. Tests run both side by side. The docstrings there say what each does; the
-- comments here say what differs. Times are seconds; "now" is the same throughout a step.
--
-- A step costs the same however many people are in the room. Only what asks for all of them reads all.

local Seats = {}

-- The room as a whole, if there is none. Its numbers begin so that no earlier room with this name has had them.
function Seats.new(unlimited_at, epoch)
  local first = math.floor(now * 1000000)
  return {
    unlimited_at = unlimited_at, vacated = now, epoch = epoch, listed = {},
    version = first,  -- grows with each change of what is held here, and by whom
    news = first,     -- grows with each change of who is an occupant
    owners = 0,       -- grows with each change of who owns a seat, and with each token that was issued without one
    place = 0, users = 0, states = {}, aliases = {}, in_call = {},
    total = {takes_seat = 0, full = 0, owns_seat = 0, removes = 0},
  }
end

-- Write the room. It is deleted after so many seconds.
function Seats.close(seconds)
  number_changes()
  Store.write(seconds)
end

local function expires_before(a, b)
  if a.expires ~= b.expires then return a.expires < b.expires end
  return a.place < b.place
end

-- Let everything expire that has.
-- Returns whether anything has, and whether a request in flight ended because its guard did not renew it.
function Seats.advance()
  local names, expired, lapsed = {}, {}, {}
  for _, found in ipairs(due.up_to(now)) do
    local name, at = found[1], found[2]
    if name:sub(1, 1) ~= 'c' then
      names[#names + 1] = name
    elseif at < now then
      write(name, nil)
      due.drop(name)
    end
  end
  for _, hold in ipairs(read_all(names)) do
    local list = hold.state == 'pending' and lapsed or expired
    list[#list + 1] = hold
  end
  table.sort(expired, expires_before)
  for _, hold in ipairs(expired) do move(hold, 'expire') end
  for _, hold in ipairs(in_order(lapsed)) do move(hold, 'release') end
  return #names > 0, #lapsed > 0
end

-- a join -----------------------------------------------------------------------------------------------------------

-- "lease" is when the hold ends unless its guard renews it.
function Seats.take(hold_id, user, limit, alias, exempt, slots, lease)
  if hold_with(hold_id) then return nil end  -- asked again, because the answer was lost
  if slots and not room.aliases[alias] then
    local number = 0
    for _ in pairs(room.aliases) do number = number + 1 end
    if number >= slots then return 'too_many_slots' end
  end
  if not limit then
    room.unlimited_at = now
  elseif not exempt and room.total.takes_seat >= limit and not owns_seat(user) then
    return room.total.full >= limit and 'full' or 'seat_pending'
  end
  put_pending({id = hold_id, user = user, state = 'pending', alias = alias, identity = '', sid = '', began = now,
               expires = 0, lease = lease})
  if exempt then Seats.exempt(user) end
end

local function time_to_arrive(user, ttl)
  local times = times_to_arrive[user]
  if not times or times.asked + ttl < now then times = {expires = now + ttl} end
  times.asked = now
  times_to_arrive[user] = times
  due.put('c' .. user, now + ttl)
  return times.expires
end

local function has_arrived(user)
  if times_to_arrive[user] then
    times_to_arrive[user] = nil
    due.drop('c' .. user)
  end
end

local function reserve(hold, alias, identity, ttl, device)
  local expires = time_to_arrive(hold.user, ttl)
  hold.state = TABLE[hold.state].moves[expires <= now and 'issue_late' or 'issue']
  hold.alias, hold.identity, hold.began, hold.expires, hold.lease = alias, identity, now, expires, nil
  hold.device = device
  put_reserved(key_of(alias, identity), hold)
  return hold
end

function Seats.issue(hold_id, alias, identity, ttl, device)
  local hold = pending[hold_id]
  if not hold then return hold_with(hold_id) end
  take_out(hold)
  count(hold, -1)
  return reserve(hold, alias, identity_of(identity, hold_id), ttl, device)
end

function Seats.issue_without_seat(hold_id, user, alias, identity, ttl, device)
  local hold = hold_with(hold_id)
  if hold then return hold end
  identity = identity_of(identity, hold_id)
  hold = {id = hold_id, user = user, state = 'pending', alias = alias, identity = identity, sid = '', began = now,
          expires = 0, device = device}
  if owns_seat(user) then return reserve(hold, alias, identity, ttl, device) end
  hold.state, hold.expires = 'issued_unseated', time_to_arrive(user, ttl)
  put_reserved(key_of(alias, identity), hold)
  return hold
end

function Seats.release(hold_id)
  if not pending[hold_id] then return false end
  move(pending[hold_id], 'release')
  return true
end

-- the call ---------------------------------------------------------------------------------------------------------

-- Whether somebody who is in the call may have a seat there. Before the first listing nobody can tell.
local function may_sit(user, alias, limit)
  return not limit or owns_seat(user) or (room.listed[alias] ~= nil and room.total.owns_seat < limit)
end

local function arrived(alias, who, limit, joined_by)
  local at, key = key_of(alias, who.sid), key_of(alias, who.identity)
  if ended.score(at) then return end
  local token = reserved[key]
  if token and token.began > joined_by then token = nil end
  local hold = sessions[at]
  if hold then
    if token then move(token, 'replace') end
  elseif token and token.user == who.user then
    hold = token
    hold.sid = who.sid
    move(hold, 'arrive')
  else
    hold = {id = who.sid, user = who.user, state = may_sit(who.user, alias, limit) and 'present' or 'unseated',
            alias = alias, identity = who.identity, sid = who.sid, began = now, expires = 0}
    put_session(hold)
  end
  has_arrived(who.user)
  if hold.state == 'unseated' and may_sit(hold.user, alias, limit) then move(hold, 'seat') end
end

function Seats.arrive(alias, who, limit)
  if not limit then room.unlimited_at = now end
  if who.joined and (room.listed[alias] or who.joined) >= who.joined + OVERTAKEN_BY then return end
  arrived(alias, who, limit, who.joined or now)
end

-- The device that an identity of /sfu/get names in clear; '' if this is none of that user's.
local function device_named_by(identity, user)
  return identity:sub(1, #user + 1) == user .. ':' and identity:sub(#user + 2) or ''
end

-- End the holds of tokens that the device of an identity was given for the same call and did not use.
local function end_unused(user, alias, identity, left_by)
  local device = device_named_by(identity, user)
  if device == '' then return end
  for _, hold in ipairs(reserved_for(user)) do
    if hold.device == device and hold.alias == alias and hold.identity ~= identity and hold.sid == ''
      and hold.began <= left_by then
      move(hold, 'leave')
    end
  end
end

local function forget_ended()
  for _, found in ipairs(ended.up_to(now - ENDED_SESSIONS_KEPT)) do ended.drop(found[1]) end
end

function Seats.leave(alias, sid, identity, left_by, by_choice)
  local at, key = key_of(alias, sid), key_of(alias, identity)
  ended.put(at, now)
  forget_ended()
  local token, hold = reserved[key], sessions[at]
  local of = hold or token
  if by_choice and of then end_unused(of.user, alias, identity, left_by) end
  if by_choice and token and (token.began <= left_by or sid ~= '' and token.sid == sid) then move(token, 'leave') end
  if hold then move(hold, by_choice and 'leave' or 'vanish') end
end

-- Tokens that were issued while the roster was unknown get the seats that are free, first come first served.
function Seats.seat_failed_open(limit)
  if not room.states.issued_unseated then return end
  local tried = room.tried
  if tried and tried[1] == room.owners and tried[2] == limit then return end  -- nothing has changed for them
  for _, hold in ipairs(without_seat('r')) do
    if owns_seat(hold.user) or room.total.owns_seat < limit then move(hold, 'seat') end
  end
  room.tried = {room.owners, limit}
end

function Seats.overflow(limit)
  local over = {}
  if not room.states.unseated then return over end
  for _, hold in ipairs(without_seat('s')) do
    if may_sit(hold.user, hold.alias, limit) then
      move(hold, 'seat')
    elseif room.total.removes >= limit and room.listed[hold.alias] then
      over[#over + 1] = hold
    end
  end
  return over
end

function Seats.seat_everybody()
  if not room.states.unseated then return end
  for _, hold in ipairs(without_seat('s')) do move(hold, 'seat') end
end

-- users and their holds ---------------------------------------------------------------------------------------------

-- This user takes no seat from others, for as long as they hold anything here. Returns whether this is new: somebody
-- who waits may find a seat.
function Seats.exempt(name)
  local user = users[name]
  if not user or user.exempt then return false end
  for _, column in ipairs(COUNTED) do
    if user[column] > 0 then room.total[column] = room.total[column] - 1 end
  end
  user.exempt = true
  users[name] = user
  room.owners = room.owners + 1
  return true
end

function Seats.rename(alias, identity, name)
  for _, hold in ipairs(sessions_with(alias, identity)) do
    local nobody = hold.user
    if nobody ~= name then
      count(hold, -1)
      hold.user = name
      count(hold, 1)
      write(field_of(hold), hold)
      forget(nobody)
    end
  end
end

-- Drop what no delayed event can refer to any more. "listing_kept" is for how many seconds the time of the last listing of
-- an SFU room is kept although nobody holds anything there.
function Seats.forget_old(listing_kept)
  forget_ended()
  for _, hold in ipairs(to_confirm(now - UNCONFIRMED_KEPT + 1)) do
    if hold.expires + UNCONFIRMED_KEPT <= now then move(hold, 'confirm') end
  end
  for alias, since in pairs(room.listed) do
    if not room.aliases[alias] and since < now - listing_kept then room.listed[alias] = nil end
  end
end
